"""On an NPU: ``pytest -m ascend tests/kernels``. Not run by this project, which has none.

The real operators against ``reference`` on the CPU of the same machine: this is the check that the stand-ins,
and so every other test of this backend, describe the operators rightly.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from research.qwen.kernels.devices import ascend_problem

pytestmark = [pytest.mark.mindspore, pytest.mark.ascend]
# Max and mean difference of logits with a standard deviation of about 3; the golden data saw half of this.
LIMITS = {"float16": (0.06, 0.01), "bfloat16": (0.5, 0.08)}
SCHEMES = (
    "int8",
    "int4",
    "int4-g64",
    "int4-asym",
    "int4-g64-asym",
    "int8-g128",
    "int8-asym",
    "int8-g64-asym",
)
DTYPES = os.environ.get("ASCEND_DTYPES", "float16").split(",")

SCRIPT = """
import sys
import mindspore
import numpy as np
from research.qwen.decode.loop import Chunk
from research.qwen.kernels.api import CacheSpec, load_kernels
from research.qwen.model.runtime import Runtime
backend, dtype, name, out = sys.argv[1:]
from tests.fixtures_util import model_folder
from tests.kernels.ascend_models import stored
options = {"dtype": dtype} if backend == "ascend" else {}
if backend == "reference":
    mindspore.set_device("CPU")
folder = model_folder(name)
config, source = stored(folder)
runtime = Runtime.load(config, source, load_kernels(backend, **options), CacheSpec(64, 16))
ids = [int(i) for i in np.random.default_rng(0).integers(0, config.vocab_size, 150)]
blocks = {"a": list(range(20)), "b": list(range(20, 40)), "c": list(range(40, 60))}
done = dict.fromkeys(blocks, 0)
steps = [[("a", 7), ("b", 140)], [("a", 1), ("b", 1)], [("a", 1), ("c", 40), ("b", 2)], [("c", 64), ("a", 1)]]
steps += [[("a", 1), ("b", 1), ("c", 1)]] * 3
rows = []
for step in steps:
    chunks = [Chunk(ids[done[n] : done[n] + k], done[n], blocks[n], 1.0, k) for n, k in step]
    rows.append(runtime.forward(chunks))
    for n, k in step:
        done[n] += k
np.savez(out, *rows)
"""


def logits(backend, dtype, name, folder, repository):
    """Rows of the script above, computed in a process of its own: a process has one MindSpore device."""
    out = folder / f"{backend}-{dtype}.npz"
    command = [sys.executable, "-c", SCRIPT, backend, dtype, name, str(out)]
    subprocess.run(command, cwd=repository, check=True, env={**os.environ, "PYTHONPATH": str(repository)})
    with np.load(out) as archive:
        return [archive[key] for key in archive.files]


@pytest.mark.parametrize("name", ["st_new_bf16", "longctx"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_equal_reference(dtype, name, tmp_path, repository):
    """Prefill of several prompts, decode, chunks beside decode: every row of every pass."""
    problem = ascend_problem()
    if problem is not None:
        pytest.skip(f"no Ascend device: {problem}")
    ours = logits("ascend", dtype, name, tmp_path, repository)
    want = logits("reference", "float32", name, tmp_path, repository)
    worst, mean = LIMITS[dtype]
    for i, (got, rows) in enumerate(zip(ours, want, strict=True)):
        difference = np.abs(got - rows)
        assert difference.max() <= worst and difference.mean() <= mean, (
            f"pass {i}: max {difference.max():.3f} mean {difference.mean():.4f}"
        )


QUANTISED = """
import json, sys
from research.qwen.kernels.api import load_kernels
from tests.kernels.ascend_models import linear_cosines
print(json.dumps(linear_cosines(load_kernels("ascend", dtype=sys.argv[1]), sys.argv[2:])))
"""


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantised_products(dtype, repository):
    """Every format the chip takes, against the dequantised matrix; says which formats it does not take."""
    problem = ascend_problem()
    if problem is not None:
        pytest.skip(f"no Ascend device: {problem}")
    formats = [scheme + order for scheme in SCHEMES for order in ("", "-order")]
    done = subprocess.run(
        [sys.executable, "-c", QUANTISED, dtype, *formats],
        cwd=repository,
        check=True,
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
    )
    cosines = json.loads(done.stdout.strip().splitlines()[-1])
    print("not taken by this chip:", sorted(set(formats) - set(cosines)) or "none")
    assert all(value >= 0.9999 for value in cosines.values()), cosines
