"""Training for as long as SOAK_MINUTES says, compiled, with batches of many sizes: nothing grows and nothing slows."""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from modest_align_kernels import ModestAlignLoss

MINUTES = float(os.environ.get("SOAK_MINUTES", "2"))
# Of steps by which caches and the allocator settle; what comes after them is compared.
SETTLED = 150
# A size that comes again and again, by which the throughput is told.
TIMED = 384


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_throughput_and_compiled_programs_stay_as_they_are() -> None:
    torch.manual_seed(0)
    adapters = nn.ModuleList(nn.Sequential(nn.Linear(n, 128), nn.GELU(), nn.Linear(128, 128)) for n in (256, 192))
    loss = ModestAlignLoss(noise_std=0.01, smoothing=0.1, logit_scale=14.3, learn_scale=True)
    parameters = [*adapters.parameters(), *loss.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    torch._dynamo.reset()
    compiler = CompileCounterWithBackend("inductor")

    @torch.compile(backend=compiler)
    def forward(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return loss(adapters[0](image), adapters[1](text))

    sizes = torch.randint(2, 800, (100_000,), generator=torch.Generator().manual_seed(1)).tolist()
    resident, seconds = [], []
    end = time.monotonic() + 60 * MINUTES
    step = 0
    while time.monotonic() < end or step < 4 * SETTLED:
        rows = TIMED if step % 4 == 3 else sizes[step % len(sizes)]
        start = time.process_time()
        value = forward(torch.randn(rows, 256), torch.randn(rows, 192))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rows == TIMED:
            # Of this process's processor time: other programs want the cores too.
            seconds.append(time.process_time() - start)
            resident.append(resident_bytes())
        assert value.isfinite(), step
        step += 1
        if step == 10:
            programs = compiler.frame_count

    later = slice(SETTLED // 4, None)
    resident, seconds = resident[later], seconds[later]
    third = len(seconds) // 3
    report = {
        "steps": step,
        "programs": [programs, compiler.frame_count],
        "MiB": [round(statistics.median(part) / 2**20, 1) for part in (resident[:third], resident[-third:])],
        "ms": [round(1000 * statistics.median(part), 3) for part in (seconds[:third], seconds[-third:])],
    }
    print(json.dumps(report))
    assert 1 <= programs <= 4, report
    assert compiler.frame_count == programs, report
    assert report["MiB"][1] - report["MiB"][0] < 4, report
    assert report["ms"][1] < 1.15 * report["ms"][0], report
