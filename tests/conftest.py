"""Shared set-up: a quiet MindSpore, no settings leaking in from the shell, and the folders tests read."""

import os

# MindSpore reads these when it is first imported, so they are set before any test module can do that.
os.environ.setdefault("GLOG_v", "3")
os.environ.setdefault("MS_ALLOC_CONF", "")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(r"^pytestmark\b.*\bmark\.(mindspore|torch|browser|slow)\b", re.MULTILINE)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """In the fast run (-m "not mindspore ..."), do not even import the files that would be deselected as a whole.

    Importing them costs the seconds that the fast run is meant to save, and fails where MindSpore is absent.
    """
    if "not mindspore" not in config.getoption("markexpr") or collection_path.suffix != ".py":
        return None
    return True if MARKED.search(collection_path.read_text(encoding="utf-8")) else None


@pytest.hookimpl(tryfirst=True)
def pytest_itemcollected(item: pytest.Item) -> None:
    """A golden model stored as .bin is read with PyTorch."""
    values = getattr(getattr(item, "callspec", None), "params", {}).values()
    if any(isinstance(value, str) and value.startswith("bin_") for value in values):
        item.add_marker(pytest.mark.torch)


@pytest.fixture(autouse=True)
def _no_qwen_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A QWEN_* variable of the developer's shell (QWEN_TIKTOKEN, ...) must not decide a test."""
    for name in [name for name in os.environ if name.startswith("QWEN_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def published_vocab() -> Path:
    """The published qwen.tiktoken out of the dashscope package, which is found without being imported."""
    spec = importlib.util.find_spec("dashscope")
    assert spec is not None and spec.origin is not None, "install the test extra: pip install -e '.[test]'"
    path = Path(spec.origin).parent / "resources" / "qwen.tiktoken"
    assert path.is_file(), f"{path} is missing from the dashscope package"
    return path


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout: configs/, scripts/ and the doors are opened by path from here."""
    return ROOT


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The embedded demo model in the published Hugging Face layout."""
    return ROOT / "research" / "qwen" / "demo" / "model"
