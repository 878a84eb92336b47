"""The layout's promises: what a wheel holds, which names are claimed, what an import costs (design, section 3)."""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest

import lrcompile

ROOT = Path(__file__).resolve().parents[1]
LINKS = {"lrcompile/passes": "../passes", "lrcompile/kernels": "../kernels"}


def git(*args: str) -> list[str]:
    run = subprocess.run(["git", *args, "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    return [entry for entry in run.stdout.split("\0") if entry]


def python(code: str, *args: str, **env: str) -> str:
    """Run `code` in a new interpreter started at the repository's root, which is then the first entry of sys.path."""
    run = subprocess.run(
        [sys.executable, "-c", code, *args], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True
    )
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    return run.stdout.strip()


def tracked_package_files() -> set[str]:
    """Where each tracked file of the package must lie in a wheel: `passes/x.py` travels as `lrcompile/passes/x.py`."""
    files = {path for path in git("ls-files") if (ROOT / path).is_file()}
    inside = {path for path in files if path.startswith("lrcompile/")} - LINKS.keys()
    linked = {f"lrcompile/{path}" for path in files if path.startswith(("passes/", "kernels/"))}
    return inside | linked


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of the tracked files, and the wheel built from that sdist (`build` does both in this order)."""
    source = tmp_path_factory.mktemp("source")
    for path in git("ls-files"):
        if (ROOT / path).exists():
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, source / path, follow_symlinks=False)
    out = tmp_path_factory.mktemp("dist")
    build = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)],
        cwd=out,
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, f"{build.stdout}\n{build.stderr}"
    return out


def test_wheel_through_the_sdist_holds_lrcompile_only_and_every_tracked_file_of_it(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    info = {name for name in names if PurePosixPath(name).parts[0].endswith(".dist-info")}
    assert names - info == tracked_package_files()
    assert any(name.endswith("/LICENSE") for name in info)


def test_sdist_carries_the_goldens_and_all_that_the_tests_need(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {str(PurePosixPath(*PurePosixPath(name).parts[1:])) for name in archive.getnames()}
    wanted = {path for path in git("ls-files", "golden", "tests") if (ROOT / path).is_file()}
    assert wanted | {"constraints.txt", "LICENSE", "Makefile"} <= names


def test_the_two_links_are_committed_as_relative_links() -> None:
    modes = {entry.split("\t")[1]: entry.split()[0] for entry in git("ls-files", "--stage", *LINKS)}
    assert modes == dict.fromkeys(LINKS, "120000")
    assert {link: os.readlink(ROOT / link) for link in LINKS} == LINKS


def test_no_file_turns_a_top_level_folder_into_something_importable() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()
    assert not (ROOT / "conftest.py").exists()  # pytest would put the root on sys.path


def test_kernels_never_resolves_to_code_of_this_repository() -> None:
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or ROOT not in Path(spec.origin).parents
    assert python("import importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin)") == "None"


def test_hugging_faces_kernels_wins_over_our_folder_at_the_repositorys_root(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    found = python("import kernels; print(kernels.__file__)", PYTHONPATH=str(tmp_path))
    assert Path(found).parent == tmp_path / "kernels"


def test_the_libraries_that_probe_for_kernels_import_at_the_repositorys_root() -> None:
    code = """
import transformers, peft, bitsandbytes, sys
from transformers import pipeline
print(getattr(sys.modules.get("kernels"), "__file__", None))"""
    assert python(code) == "None"


def test_importing_lrcompile_loads_nothing_but_lrcompile_and_the_standard_library() -> None:
    code = """
import sys
before = set(sys.modules)
import lrcompile
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))"""
    assert python(code) == "lrcompile"


@pytest.mark.parametrize("arguments", [["--help"], ["methods"]])
def test_the_command_line_answers_without_importing_torch(arguments: list[str]) -> None:
    code = """
import sys
from lrcompile.cli import main
sys.argv[0] = "lrcompile"
try:
    status = main()
except SystemExit as stop:
    status = stop.code
assert status in (0, None), status
print("torch" in sys.modules)"""
    assert python(code, *arguments).splitlines()[-1] == "False"


def module_names() -> list[str]:
    """Every module of the package; `fused…` ones need Triton, `__main__` would run."""
    found = []
    for folder, _, files in os.walk(ROOT / "lrcompile", followlinks=True):
        prefix = ".".join(Path(folder).relative_to(ROOT).parts)
        stems = {Path(file).stem for file in files if file.endswith(".py") and not file.startswith("fused")} - {
            "__main__"
        }
        found += [prefix if stem == "__init__" else f"{prefix}.{stem}" for stem in stems]
    return sorted(found)


def test_no_module_carries_the_name_of_a_public_callable() -> None:
    """Importing `lrcompile.merge` the module would replace `lrcompile.merge` the function."""
    modules = {name.split(".")[1] for name in module_names() if name.count(".") >= 1}
    assert modules & set(lrcompile.__all__) <= set(lrcompile._MODULES)


@pytest.mark.parametrize("seed", [1, 2])
def test_public_names_survive_importing_every_module_in_any_order(seed: int) -> None:
    names = module_names()
    random.Random(seed).shuffle(names)
    code = """
import importlib, sys, types
for name in sys.argv[1:]:
    importlib.import_module(name)
assert not {"passes", "kernels"} & sys.modules.keys()
import lrcompile
for name, home in lrcompile._HOME.items():
    value = getattr(lrcompile, name)
    assert callable(value) and value is getattr(importlib.import_module(f"lrcompile.{home}"), name), name
for name in lrcompile._MODULES:
    assert isinstance(getattr(lrcompile, name), types.ModuleType), name
assert set(dir(lrcompile)) >= set(lrcompile.__all__)
print(lrcompile.methods()[0])"""
    assert python(code, *names)
