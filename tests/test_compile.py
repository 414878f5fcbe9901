"""How often torch.compile compiles, while the lattices change from step to step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cases.runs import patterns, read_log, tiny_config
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from ser_fast import LatticeMap, SERLoss
from ser_fast.training.config import with_options
from ser_fast.training.trainer import train
from ser_fast.views.samplers import D4Scale, draws
from ser_fast.vit import SplitViT

pytestmark = pytest.mark.slow
STEPS = 50


@pytest.fixture
def graphs() -> CompileCounterWithBackend:
    torch.compiler.reset()
    return CompileCounterWithBackend("eager")


def test_a_loop_of_ones_own_compiles_its_step_three_times_at_most(graphs: CompileCounterWithBackend) -> None:
    """Encoder and SERLoss in one compiled function, without a break."""
    torch.manual_seed(0)
    vit = SplitViT("vit_tiny_patch16_224", 1, img_size=64, patch_size=8, embed_dim=24, depth=2, num_heads=2)
    ser = SERLoss(24, hidden_dim=16, out_dim=8)

    def step(images0: Tensor, images1: Tensor, g0: LatticeMap, g1: LatticeMap) -> Tensor:
        one, other = vit.encode(images0, (1,)), vit.encode(images1, (1,))
        assert one.embedding is not None
        return one.embedding.square().mean() + ser(one.tokens[1], other.tokens[1], g0, g1)

    compiled, lattices = torch.compile(step, backend=graphs, fullgraph=True), set()
    for number in range(STEPS):
        samples = 4 * number + torch.arange(4)
        g0, g1 = (D4Scale()((64, 64), 8, draws(0, 0, samples, view), view) for view in (0, 1))
        lattices.add((g0.size_out, g1.size_out))
        images = [torch.randn(4, 3, *g.size_out) for g in (g0, g1)]
        loss = compiled(*images, g0, g1)
        if number % 10 == 0:  # of the model's own lattice, too
            torch.testing.assert_close(loss, step(*images, g0, g1))
    assert len(lattices) > 30
    assert graphs.frame_count <= 3


def test_a_training_compiles_in_its_first_step_alone(
    graphs: CompileCounterWithBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = patterns(tmp_path / "images", 24)
    config = with_options(tiny_config(tmp_path / "run", data), {"optim.steps": STEPS, "compile": True})
    compile_module, counts = nn.Module.compile, []

    def counted(self: nn.Module, *_: Any) -> None:
        counts.append(graphs.frame_count)

    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compile_module(self, backend=graphs, **options))
    monkeypatch.setattr("ser_fast.training.trainer.Trainer.save", counted)
    train(with_options(config, {"save_every": 1}))
    # Blocks: the first one, whose input has no gradient; the others; the teacher's. Heads: of the student, its
    # predictor, the teacher's. None has more for its own code than three.
    assert counts == [6] * STEPS
    plain = with_options(config, {"compile": False, "out": tmp_path / "plain", "optim.steps": STEPS, "save_every": 100})
    train(plain)
    for one, other in zip(read_log(config.out), read_log(plain.out), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
