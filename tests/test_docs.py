# SPDX-License-Identifier: Apache-2.0
"""Every snippet and every command in the documentation runs."""

import doctest
import importlib
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import peftkern
from peftkern.__main__ import build_parser

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def skip_without(code: str) -> None:
    """Skips where a package that the code imports, and peftkern does not need, is not installed."""
    for package in ("transformers", "peft", "bitsandbytes", "accelerate", "trl"):
        if re.search(rf"^[\s>]*(import|from) {package}\b", code, flags=re.MULTILINE):
            pytest.importorskip(package)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    skip_without("\n".join(blocks(page, "python")))
    namespace: dict = {}
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), namespace)


COMMANDS = [
    (page.name, line.split("#")[0].strip())
    for page in PAGES
    for block in blocks(page, "bash")
    for line in block.splitlines()
    if line.split("#")[0].strip()
]


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{p}: {c}" for p, c in COMMANDS])
def test_commands_are_valid(page, command):
    """The parser or make accepts each. Both make targets run in full before a change lands, pip in test_pip_install,
    the launchers in test_distributed.py."""
    words = shlex.split(command)
    if words[0] == "peftkern":
        build_parser().parse_args(words[1:])
    elif words[0] in ("torchrun", "accelerate"):
        if words[0] == "torchrun":
            from torch.distributed.run import get_args_parser

            parsed = get_args_parser().parse_args(words[1:])
        else:
            launch = pytest.importorskip("accelerate.commands.launch")
            parsed = launch.launch_command_parser().parse_args(words[2:])
        assert not parsed.training_script.startswith("examples/") or (ROOT / parsed.training_script).exists()
    elif words[0] == "make":
        result = subprocess.run([*words, "-n"], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    elif command.startswith("python benchmarks/gpu.py"):  # it reads its options, then looks for a GPU
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        result = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, env=env, capture_output=True, text=True)
        assert result.stderr.startswith("error: no GPU"), result.stderr
    else:
        assert command == "pip install . --no-build-isolation", f"{page}: no test runs {command!r}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_inline_make_targets_and_paths_exist(page):
    text = page.read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make (\w+)`", text):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"{page.name}: make {target}"
    for path in re.findall(r"`((?:peftkern|csrc|tests|benchmarks|docs)/[\w./]+\.\w+)`", text):
        assert (ROOT / path).exists(), f"{page.name}: {path}"
    for link in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (page.parent / link).exists(), f"{page.name}: {link}"


def modules() -> list[str]:
    found = [m.name for m in pkgutil.walk_packages(peftkern.__path__, "peftkern.") if not m.name.endswith("__main__")]
    return ["peftkern", *(name for name in found if not name.endswith("._C") and ".finetune" not in name)]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name):
    if name.endswith("integrations.transformers"):
        pytest.importorskip("transformers")
    skip_without("\n".join(Path(importlib.import_module(name).__file__).read_text().split('"""')[1::2]))
    names = {"torch": importlib.import_module("torch"), "nn": importlib.import_module("torch").nn}
    names |= {k: getattr(peftkern, k) for k in peftkern.__all__}
    result = doctest.testmod(importlib.import_module(name), extraglobs=names, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_every_public_name_is_documented():
    for name in peftkern.__all__:
        assert getattr(peftkern, name).__doc__, name


@pytest.mark.slow
def test_pip_install(tmp_path):
    """`pip install . --no-build-isolation` into an environment of one's own; --target stands for that environment."""
    env = {**os.environ, "PEFTKERN_CUDA": "0", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    source = tmp_path / "source"
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for file in filter(None, files):
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        (source / file).write_bytes((ROOT / file).read_bytes())
    command = [sys.executable, "-m", "pip", "install", "-q", ".", "--no-build-isolation", "--no-deps"]
    subprocess.run([*command, "--target", str(tmp_path / "site")], cwd=source, env=env, check=True)
    code = "import peftkern; print(peftkern.__file__, peftkern.info()['peftkern'])"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**env, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True, text=True,
    )  # fmt: skip
    assert out.stdout.split() == [str(tmp_path / "site" / "peftkern" / "__init__.py"), "0.1.0"], out.stderr


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_examples_run(example):
    pytest.importorskip("transformers")
    out = subprocess.run([sys.executable, str(example)], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
