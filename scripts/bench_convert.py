"""Measure the converter's peak memory on a synthetic checkpoint: ``bench_convert.py --work DIR [--gb 4]``.

Writes a checkpoint of Qwen-1.8B's shape (as many layers as it takes) with random numbers, as sharded
safetensors and as .bin, converts it to .safetensors and .ckpt in a child process each, and samples
/proc/PID/status. Prints JSON. The baseline is a child that imports what the converter imports (torch too, for
.bin) and stops there. Bound: peak above the baseline at most three times the largest tensor. The data is
deleted in the end.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from research.qwen.config import SIZES, QwenConfig, with_changes  # noqa: E402
from research.qwen.weights.companions import config_text  # noqa: E402
from research.qwen.weights.convert import silent, write_shards  # noqa: E402
from research.qwen.weights.names import expected  # noqa: E402
from research.qwen.weights.outputs import OutputSet  # noqa: E402
from research.qwen.weights.writers import OutputTensor  # noqa: E402

SHARD = 2_000_000_000
BASELINE = "import research.qwen.weights.convert, research.qwen.weights.export{torch}"
CHUNK = 1 << 22


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for the data (three times --gb of space)"
    )
    parser.add_argument("--gb", type=float, default=4.0, help="least size of the checkpoint")
    parser.add_argument("--keep", action="store_true", help="do not delete the data")
    args = parser.parse_args(argv)
    config = shape_of(args.gb * 1e9)
    sizes = {name: 2 * int(np.prod(shape)) for name, shape in expected(config).items()}
    runs: list[dict[str, object]] = []
    report = {
        "layers": config.num_layers,
        "checkpoint_gb": round(sum(sizes.values()) / 1e9, 3),
        "largest_tensor_mb": round(max(sizes.values()) / 1e6, 1),
        "bound_mb": round(3 * max(sizes.values()) / 1e6, 1),
        "runs": runs,
    }
    args.work.mkdir(parents=True, exist_ok=True)
    try:
        for kind in ("safetensors", "bin"):
            source = args.work / f"source-{kind}"
            make_source(source, config, kind)
            for suffix, more in (("safetensors", []), ("ckpt", []), ("safetensors", ["--dtype", "float32"])):
                runs.append(run(source, kind, args.work / "out" / f"q.{suffix}", more))
                if (kind, suffix, more) == ("safetensors", "ckpt", []):
                    runs.append(reverse(args.work / "out", args.work / "back"))
                shutil.rmtree(args.work / "out")
            if kind == "safetensors":
                runs.append(export(source, args.work / "qwen2"))
            shutil.rmtree(source)
    finally:
        if not args.keep:
            for name in ("source-safetensors", "source-bin", "out", "back", "qwen2"):
                shutil.rmtree(args.work / name, ignore_errors=True)
    worst = max(float(str(one["peak_hwm_above_baseline_mb"])) for one in runs)
    report["worst_above_baseline_mb"] = worst
    report["within_bound"] = worst <= 3 * max(sizes.values()) / 1e6
    print(json.dumps(report, indent=1))
    return 0 if report["within_bound"] else 1


def shape_of(size: float) -> QwenConfig:
    """Qwen-1.8B with as many layers as ``size`` bytes of bfloat16 take."""
    config = SIZES["1.8b"]
    while sum(2 * int(np.prod(shape)) for shape in expected(config).values()) < size:
        config = with_changes(config, num_layers=config.num_layers + 1)
    return config


def make_source(folder: Path, config: QwenConfig, kind: str) -> None:
    """A checkpoint of small random bfloat16 numbers."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if kind == "bin":
        # In a child: torch.save holds its tensors in memory.
        subprocess.run(
            [sys.executable, "-c", _MAKE_BIN, str(folder), str(config.num_layers)], cwd=ROOT, check=True
        )
    else:
        tensors = [
            OutputTensor(name, shape, "bfloat16", noise(shape)) for name, shape in expected(config).items()
        ]
        with OutputSet(folder) as output:
            write_shards(output, tensors, silent, SHARD)
    (folder / "config.json").write_text(config_text(config, "bfloat16"))


def noise(shape: tuple[int, ...]) -> Callable[[], Iterator[np.ndarray]]:
    """Blocks of random bfloat16 bits, all finite and below 2."""

    def blocks() -> Iterator[np.ndarray]:
        rng = np.random.default_rng(0)
        left = int(np.prod(shape))
        while left:
            count = min(left, CHUNK)
            yield rng.integers(0, 0x3F80, count, dtype=np.uint16)
            left -= count

    return blocks


_MAKE_BIN = """
import json, sys, torch
from pathlib import Path
from research.qwen.config import SIZES, with_changes
from research.qwen.weights.names import expected
folder, layers = Path(sys.argv[1]), int(sys.argv[2])
names = list(expected(with_changes(SIZES["1.8b"], num_layers=layers)).items())
half, where = len(names) // 2, {}
for i, part in enumerate((names[:half], names[half:])):
    noise = {name: torch.randint(0, 0x3F80, shape, dtype=torch.int16) for name, shape in part}
    state = {name: bits.view(torch.bfloat16) for name, bits in noise.items()}
    file = f"pytorch_model-{i + 1:05d}-of-00002.bin"
    torch.save(state, folder / file)
    where |= dict.fromkeys(state, file)
    del state, noise
(folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
"""


def run(source: Path, kind: str, target: Path, more: list[str]) -> dict[str, object]:
    """One conversion, measured."""
    name = f"{kind} -> {target.suffix[1:]}{' ' + more[1] if more else ''}"
    args = ["--torch_ckpt_dir", str(source), "--mindspore_ckpt_path", str(target), *more]
    return measure(name, args, kind == "bin")


def reverse(source: Path, target: Path) -> dict[str, object]:
    """The way back, measured."""
    args = ["--reverse", "--mindspore_ckpt_path", str(source), "--torch_ckpt_dir", str(target)]
    found = measure("ckpt -> Hugging Face folder", args, False)
    shutil.rmtree(target)
    return found


def export(source: Path, target: Path) -> dict[str, object]:
    """The export, measured."""
    found = measure(
        "safetensors -> qwen2",
        ["--export", "qwen2", "--torch_ckpt_dir", str(source), "--output", str(target)],
        False,
    )
    shutil.rmtree(target)
    return found


def measure(name: str, args: list[str], torch: bool) -> dict[str, object]:
    """Peak memory of a conversion in a child process, in MB, above that of its imports."""
    base, _, _ = watch([sys.executable, "-c", BASELINE.format(torch=", torch" if torch else "")])
    peak, anonymous, seconds = watch([sys.executable, str(ROOT / "convert_weight.py"), "-q", *args])
    return {
        "run": name,
        "baseline_hwm_mb": base,
        "peak_hwm_mb": peak,
        "peak_anonymous_mb": anonymous,
        "peak_hwm_above_baseline_mb": round(peak - base, 1),
        "seconds": seconds,
    }


def watch(command: list[str]) -> tuple[float, float, float]:
    """VmHWM (from the kernel) and the highest RssAnon seen, in MB, and the seconds a command took."""
    start = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT) as child:
        high = anonymous = 0
        while child.poll() is None:
            status = Path(f"/proc/{child.pid}/status").read_text()
            values = {
                line.split(":")[0]: line.split()[1]
                for line in status.splitlines()
                if line.startswith(("VmHWM", "RssAnon"))
            }
            high = max(high, int(values.get("VmHWM", 0)))
            anonymous = max(anonymous, int(values.get("RssAnon", 0)))
            time.sleep(0.002)
        if child.returncode:
            raise SystemExit(f"{' '.join(command)} failed with {child.returncode}")
    return round(high * 1024 / 1e6, 1), round(anonymous * 1024 / 1e6, 1), round(time.monotonic() - start, 1)


if __name__ == "__main__":
    sys.exit(main())
