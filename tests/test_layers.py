"""The layer check: the tree passes, and every rule catches a made-up violation."""

from pathlib import Path

import pytest

from scripts.check_layers import MAX_FILE, MAX_FUNCTION, light_modules, main, violations


def make_tree(root: Path, files: dict[str, str]) -> Path:
    """A small research/qwen with the given files on top of a clean base."""
    base = {"__init__.py": "", "errors.py": "", "config.py": "from research.qwen.errors import X\n"}
    for name, text in {**base, **files}.items():
        path = root / "research" / "qwen" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


@pytest.mark.slow
def test_the_tree_passes(repository: Path) -> None:
    assert violations(repository) == []


ALLOWED = {
    "lower tier": {"text/a.py": "from research.qwen.errors import X\n"},
    "own folder": {"text/a.py": "from research.qwen.text import b\n", "text/b.py": ""},
    "package itself": {"text/a.py": "from research.qwen import __version__\n"},
    "same unit of two files": {"engine.py": "import research.qwen.scheduler\n", "scheduler.py": ""},
    "lazy mindspore in a light module": {"engine.py": "def f():\n    import mindspore\n"},
    "type-only mindspore": {
        "kernels/api.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import mindspore\n"
    },
    "mindspore in a backend": {"kernels/cpu.py": "import mindspore\n"},
    "mindformers in mf": {"mf/a.py": "import mindformers\nfrom transformers import X\n"},
    "layers of mindformers for ascend": {"kernels/ascend.py": "from mindformers.modules.layers import X\n"},
    "one torch reader": {"weights/readers.py": "def f():\n    import torch\n"},
    "cli starts a surface": {"cli/a.py": "import research.qwen.serve.b\n", "serve/b.py": ""},
    "door into cli": {"run_qwen_7b.py": "from research.qwen.cli import main\n"},
}


@pytest.mark.parametrize("files", ALLOWED.values(), ids=ALLOWED.keys())
def test_allowed(tmp_path: Path, files: dict[str, str]) -> None:
    assert violations(make_tree(tmp_path, files)) == []


FORBIDDEN = {
    "higher tier": ({"text/a.py": "import research.qwen.model.b\n", "model/b.py": ""}, "text/a.py:1: tier 1"),
    "higher tier inside a function": (
        {"decode/a.py": "def f():\n    from research.qwen.engine import Engine\n"},
        "decode/a.py:2: tier 1 (decode) imports research.qwen.engine of tier 4",
    ),
    "sibling folder of tier 1": (
        {"text/a.py": "from research.qwen.decode.params import X\n"},
        "text/a.py:1: tier 1 (text) imports research.qwen.decode.params of tier 1 (decode)",
    ),
    "sibling single file": ({"weights/a.py": "from research.qwen.settings import X\n"}, "(settings)"),
    "submodule by name": (
        {"text/a.py": "from research.qwen import rope\n", "rope.py": ""},
        "research.qwen.rope",
    ),
    "surface to surface": (
        {"serve/a.py": "import research.qwen.evals\n"},
        "(serve) imports research.qwen.evals",
    ),
    "surface to cli": ({"evals/a.py": "import research.qwen.cli\n"}, "(evals) imports research.qwen.cli"),
    "relative": ({"text/a.py": "from . import b\n"}, "text/a.py:1: relative import"),
    "own module by its bare name": ({"cli/a.py": "import config\n"}, "imports config as a top-level module"),
    "configs as a module": (
        {"cli/a.py": "import configs.run\n"},
        "imports configs.run as a top-level module",
    ),
    "no tier": ({"extras/a.py": ""}, "extras/a.py:1: has no tier"),
    "import of what has no tier": ({"text/a.py": "import research.qwen.extras.b\n"}, "which has no tier"),
    "mindformers outside mf": (
        {"engine.py": "def f():\n    import mindformers\n"},
        "only mf/ touches MindFormers",
    ),
    "mindformers in a door": (
        {"qwen_chat.py": "from mindformers import X\n"},
        "only mf/ touches MindFormers",
    ),
    "registry for ascend": (
        {"kernels/ascend.py": "from mindformers.tools.register import X\n"},
        "may use mindformers.modules only",
    ),
    "torch outside weights": ({"model/a.py": "def f():\n    import torch\n"}, "only one reader in weights/"),
    "second torch reader": (
        {"weights/a.py": "def f():\n    import torch\n", "weights/b.py": "def f():\n    import torch\n"},
        "weights/b.py:2: imports torch; only one reader may, and research/qwen/weights/a.py does",
    ),
    "transformers": ({"weights/a.py": "def f():\n    import transformers\n"}, "imports transformers"),
    "does not parse": ({"text/a.py": "def f(:\n"}, "text/a.py:1: does not parse"),
    "long file": ({"text/a.py": "x = 1\n" * (MAX_FILE + 1)}, f"file of {MAX_FILE + 1} lines"),
    "long function": (
        {"text/a.py": "class A:\n    def f(self):\n" + "        x = 1\n" * MAX_FUNCTION},
        f"text/a.py:2: function f of {MAX_FUNCTION + 1} lines",
    ),
}
LIGHT_PLACES = (
    "errors.py text/a.py kernels/api.py kernels/build.py engine.py serve/a.py train/data.py evals/a.py"
)
HEAVY_PLACES = [*LIGHT_PLACES.split(), "cli/a.py"]
FORBIDDEN |= {
    f"mindspore at module level of {place}": (
        {place: "try:\n    import mindspore.ops\nexcept ImportError:\n    pass\n"},
        f"{place}:2: imports mindspore at module level",
    )
    for place in HEAVY_PLACES
}


@pytest.mark.parametrize(("files", "message"), FORBIDDEN.values(), ids=FORBIDDEN.keys())
def test_forbidden(tmp_path: Path, files: dict[str, str], message: str) -> None:
    found = violations(make_tree(tmp_path, files))
    assert len(found) == 1
    assert message in found[0]
    assert found[0].startswith("research/qwen/")


def test_limits_hold_for_scripts_too(tmp_path: Path) -> None:
    make_tree(tmp_path, {})
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "long.py").write_text("x = 1\n" * (MAX_FILE + 1))
    assert violations(tmp_path) == [
        f"scripts/long.py:{MAX_FILE + 1}: file of {MAX_FILE + 1} lines (at most {MAX_FILE})"
    ]


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    make_tree(tmp_path, {})
    assert main([str(tmp_path)]) == 0
    make_tree(tmp_path, {"text/a.py": "from . import b\n"})
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.startswith("research/qwen/text/a.py:1: relative import")


def test_light_modules_are_collected_from_the_tree(tmp_path: Path) -> None:
    files = dict.fromkeys(
        ("text/__init__.py", "text/a.py", "kernels/cpu.py", "kernels/api.py", "cli/__main__.py"), ""
    )
    assert light_modules(make_tree(tmp_path, files)) == [
        "research.qwen",
        "research.qwen.config",
        "research.qwen.errors",
        "research.qwen.kernels.api",
        "research.qwen.text",
        "research.qwen.text.a",
    ]
