"""The package as it is shipped: contents, metadata, and life without a compiled extension."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def tracked_sources():
    """Every Python file of the package and every source of the extension, as in the repository."""
    python = [*ROOT.glob("ato_fast/**/*.py"), *ROOT.glob("kernels/**/*.py")]
    native = [p for p in ROOT.glob("csrc/**/*") if p.is_file()]
    return [p.relative_to(ROOT) for p in python if "__pycache__" not in p.parts], [
        p.relative_to(ROOT) for p in native
    ]


def copy_of_the_sources(target):
    python, native = tracked_sources()
    more = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt",
            "CHANGELOG.md", "CONTRIBUTING.md")  # fmt: skip
    for path in (*python, *native, *map(Path, more)):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, target / path)


@pytest.mark.slow
def test_source_distribution_holds_all_that_a_build_needs(tmp_path):
    source = tmp_path / "source"
    copy_of_the_sources(source)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)],
        cwd=source,
        env={**os.environ, "FORCE_CUDA": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    python, native = tracked_sources()
    assert {str(p) for p in (*python, *native)} <= names
    assert {"LICENSE", "README.md", "pyproject.toml", "setup.py"} <= names
    assert not [n for n in names if n.startswith(("tests/", "benchmarks/", ".ci"))]


@pytest.mark.slow
def test_installed_package_holds_every_module_and_no_other(tmp_path):
    """What ``build_py`` puts into a wheel; the compiled half is checked by .ci/wheel."""
    source = tmp_path / "source"
    copy_of_the_sources(source)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "-d", str(tmp_path / "lib")],
        cwd=source,
        env={**os.environ, "FORCE_CUDA": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    python, _ = tracked_sources()
    expected = {str(Path("ato_fast") / p if p.parts[0] == "kernels" else p) for p in python}
    built = {str(p.relative_to(tmp_path / "lib")) for p in (tmp_path / "lib").rglob("*.py")}
    assert built == expected


@pytest.fixture(scope="module")
def uncompiled(tmp_path_factory):
    """A folder with the package as pure Python, without its extension."""
    folder = tmp_path_factory.mktemp("pure")
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "ato_fast", folder / "ato_fast", ignore=ignore)
    shutil.copytree(ROOT / "kernels", folder / "ato_fast" / "kernels", ignore=ignore)
    return folder


def run_uncompiled(folder, script, **environment):
    kept = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        # No PATH: neither a compiler nor ninja can be found.
        env={**kept, "PATH": "/nonexistent", **environment},
        capture_output=True,
        text=True,
    )


STEP = """
import torch, ato_fast as ato
from torch import nn
model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
                      nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
layout = ato.trace(model, (torch.randn(2, 1, 6, 6),))
optimizer = ato.SGD(model, layout, lr=0.1)
optimizer.set_mask(torch.tensor([1, 0, 1, 0]), threshold=float("inf"))
model(torch.randn(2, 1, 6, 6)).sum().backward()
optimizer.step()
print(ato.__file__, int(optimizer.n_zero()))
"""


def test_it_works_without_compiler_and_extension(uncompiled):
    done = run_uncompiled(uncompiled, STEP)
    assert done.returncode == 0, done.stderr
    where, zeros = done.stdout.split()
    assert Path(where).is_relative_to(uncompiled) and zeros == "2"


def test_a_forced_backend_that_is_missing_raises_and_says_why(uncompiled):
    done = run_uncompiled(uncompiled, STEP, ATO_FAST_BACKEND="cpu")
    assert done.returncode != 0
    assert "ATO_FAST_BACKEND" in done.stderr and "_C" in done.stderr


def test_every_make_target_is_phony_and_sets_up_what_it_needs():
    text = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"^\.PHONY: (.*)$", text, flags=re.MULTILINE)[1].split())
    rules = dict(re.findall(r"^([a-z-]+):(.*)$", text, flags=re.MULTILINE))
    assert phony == set(rules) == {
        "install", "lint", "format", "test", "test-gpu", "zoo", "sanitize", "bench",
        "bench-accuracy", "demo", "clean",
    }  # fmt: skip
    assert all("$(STAMP)" in needs for target, needs in rules.items() if target != "clean")


def test_every_direct_dependency_is_pinned():
    tomllib = pytest.importorskip("tomllib")

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pins = set()
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            assert re.match(r"\d", version), f"not an exact pin: {line}"
            pins.add(name.lower())
    extras = project["project"]["optional-dependencies"].values()
    wanted = [*project["project"]["dependencies"], *(x for extra in extras for x in extra)]
    names = {re.match(r"[A-Za-z0-9-]+", x)[0].lower() for x in wanted} - {"ato-fast"}
    assert names <= pins, f"not pinned: {sorted(names - pins)}"


def test_version_is_the_same_everywhere():
    tomllib = pytest.importorskip("tomllib")

    import ato_fast

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert ato_fast.__version__ == project["version"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    "line, banned",
    [
        ("import " + "pickle", True),
        ("state = torch.load" + "(path)", True),
        ("torch._" + "foreach_add_(a, b)", True),
        ("# TO" + "DO later", True),
        ("x = torch.ones(3)", False),
    ],
)
def test_banned_patterns_are_found(tmp_path, line, banned):
    (tmp_path / "module.py").write_text(f"{line}\n")
    done = subprocess.run(
        [str(ROOT / ".ci" / "banned"), str(tmp_path)], capture_output=True, text=True
    )
    assert (done.returncode != 0) == banned, done.stdout + done.stderr
