"""The README is true: its example runs as written, its commands exist."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_examples_run_as_written(tmp_path):
    blocks = python_blocks()
    assert len(blocks) >= 2
    script = "\n".join(blocks) + "\nprint('reached the end')\n"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("reached the end\n")
    assert (tmp_path / "small" / "recipe.json").exists()


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    mentioned = set(re.findall(r"^make ([a-z-]+)", README, flags=re.MULTILINE))
    assert {"demo", "test"} <= mentioned <= targets


def test_documented_files_exist():
    for document in ("README.md", "docs/architecture.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text()
        for path in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (ROOT / document).parent.joinpath(path).exists(), f"{document}: {path}"
