"""The project as files: what they promise about one another."""

import ast
import copy
import importlib.metadata
import re
import subprocess
import sys
import tomllib

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gudlib import files
from gudlib.book import notebooks

ROOT = files.ROOT
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [Requirement(text) for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]]

# A module may import those before it. Leaves import none; siblings don't know one another.
ORDER = """files devices checks doors lattice statistics bases priors schedules families process exact zoo networks data
    importance likelihood references denoiser training samplers windows baselines metrics mar.networks mar.model
    mar.training mar.sampling mar.likelihood mar.mixtures mar designs plotting model book book.claims book.parameters
    book.notebooks book.runs book.doctor __main__""".split()
LEAVES = {"files", "devices", "checks", "book"}
SIBLINGS = {"training", "samplers", "likelihood"}
TAGS = ("navigation", "parameters", "nbval-check-output")


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def test_conda_and_pip_install_the_same():
    *conda, pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert pip == {"pip": ["--editable ."]}
    renamed = {"pytorch": "torch"}
    found = {Requirement(text).name: str(Requirement(text).specifier) for text in conda}
    found = {renamed.get(name, name): versions for name, versions in found.items()}
    wanted = {requirement.name: str(requirement.specifier) for requirement in REQUIREMENTS}
    wanted |= {extra: "" for requirement in REQUIREMENTS for extra in requirement.extras}  # pyright[nodejs]
    python = str(Requirement("python" + PROJECT["requires-python"]).specifier)
    assert found == wanted | {"python": python, "pip": ""}


def test_constraints_pin_every_dependency_as_tested():
    pinned, seen, queue = pins(), set(), list(REQUIREMENTS)
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if (name, *requirement.extras) in seen:
            continue
        seen.add((name, *requirement.extras))
        assert name in pinned, f"{name} is not pinned"
        assert importlib.metadata.version(name).split("+")[0] == pinned[name]
        for text in importlib.metadata.requires(name) or ():
            needed = Requirement(text)
            extras = requirement.extras or {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                queue.append(needed)
    assert pinned["torch"] == "2.13.0"
    assert not [name for name in pinned if name.startswith(("nvidia", "cuda", "triton"))]


def test_import_arrows_point_one_way():
    parts = {path: path.relative_to(ROOT / "gudlib").with_suffix("").parts for path in (ROOT / "gudlib").rglob("*.py")}
    modules = {".".join(part).removesuffix(".__init__"): path for path, part in parts.items()}
    del modules["__init__"]
    assert set(modules) == set(ORDER)
    for name, path in modules.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            if names and (node.module or "").partition(".")[0] == "gudlib" and names != ["__version__"]:
                room = str(node.module).partition(".")[2]
                inner = {f"{room}.{alias.name}".lstrip(".") for alias in node.names} & set(ORDER)
                found |= inner or {room}
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{name}: relative import"
            assert not (isinstance(node, ast.Import) and any(a.name.startswith("gudlib") for a in node.names)), name
        allowed = set() if name in LEAVES else set(ORDER[: ORDER.index(name)])
        assert found <= allowed - (SIBLINGS if name in SIBLINGS else set()), f"{name} imports {found}"


def test_importing_the_package_is_cheap():
    code = """import sys, gudlib
assert gudlib.__version__ and 'bases' in dir(gudlib) and not {'torch', 'numpy', 'matplotlib'} & {*sys.modules}
assert gudlib.schedules.__name__ == 'gudlib.schedules' and 'torch' in sys.modules
assert not hasattr(gudlib, 'nothing')"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_readme_lists_the_notebooks():
    row = r"^\| \[(\d\d[a-z]?)\]\(notebooks/(\S+)\) \|(.+)\|(.+)\|(.+)\|$"
    rows = re.findall(row, (ROOT / "README.md").read_text(), re.M)
    assert [name for _, name, *_ in rows] == [path.name for path in notebooks.book()]
    assert all(name.startswith(number) and all(cell.strip() for cell in cells) for number, name, *cells in rows)


def test_readme_and_makefile_agree():
    promised = set(re.findall(r"(?:`|^ {4})make ([a-z]+)", (ROOT / "README.md").read_text(), re.M))
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert promised <= targets
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / path).exists(), path


def test_the_readmes_picture_is_a_notebooks_figure():
    shown = [picture for path in notebooks.book() for picture in notebooks.pictures(nbformat.read(path, 4))]
    assert shown == [notebooks.PICTURE.read_bytes()]


@pytest.mark.parametrize("path", sorted(files.NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_is_clean(path):
    content = nbformat.read(path, 4)
    code = [cell for cell in content.cells if cell.cell_type == "code"]
    tagged = {tag: [cell for cell in content.cells if tag in cell.metadata.get("tags", ())] for tag in TAGS}
    number = f"{notebooks.number(path)} · " if path in notebooks.book() else ""
    assert re.match(rf"# {number}\S", content.cells[0].source)
    assert content.cells[1:2] == tagged["navigation"], f"python -m gudlib refresh {path.stem}"
    assert content.cells[1].source == notebooks.navigation(path), f"python -m gudlib refresh {path.stem}"
    assert len(tagged["parameters"]) == 1 and notebooks.parameters_of(path)
    assert path.stat().st_size < 1_500_000
    for cell in code:
        first = cell.source.partition("\n")[0]
        assert len(cell.source.splitlines()) <= 30, first
        assert cell.execution_count, f"not executed: {first}"
        assert cell.outputs or cell not in tagged["nbval-check-output"], f"nothing to compare with: {first}"
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr", first
            shown = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            assert not re.search(r"/(home|root|tmp|work|Users)/|0x[0-9a-f]{9}", cell.source + shown), first
    before = copy.deepcopy(content)
    assert notebooks.settled(content) == before, f"python -m gudlib refresh {path.stem}"
