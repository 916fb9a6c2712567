"""Steps of every optimizer and projection on a model with awkward tensors, to run under a checker.

``PYTHONPATH=tests compute-sanitizer python -m benchmarks.sanitize``. Nothing is compared here; the
checker does the looking, and its ``--error-exitcode`` is the verdict.
"""

from __future__ import annotations

import argparse
import itertools
import sys

import torch

from ato_fast import backend
from samples import PROJECTIONS, VARIANTS, by_name, every_layout, layout_of, random_mask, set_grads


def main(argv: list[str] | None = None) -> int:
    """Run the steps on the device; 2 if there is none."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    n_steps = 0
    for dtype, variant, projection in itertools.product(options.dtypes, VARIANTS, PROJECTIONS):
        model = every_layout(getattr(torch, dtype)).to(options.device)
        layout = layout_of(model)
        optimizer = variant(model, layout, projection=projection)
        for step, keep in enumerate((1.0, 0.5, 0.0)):
            optimizer.set_mask(random_mask(layout, keep=keep), 0.4, threshold=0.01)
            set_grads(model, step)
            if step == 1:
                model.heads.weight.grad = None
            optimizer.step()
            n_steps += 1
        if not torch.isfinite(optimizer.group_norms()).all():
            print(f"{by_name(variant)}, {by_name(projection)}: not finite", file=sys.stderr)
            return 1
    served = backend.serving("group_step_", torch.device(options.device), [torch.float32])
    print(f"{n_steps} steps served by {served}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
