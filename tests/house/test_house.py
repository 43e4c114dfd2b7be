"""The house's rules: imports point one way, importing has no effects, versions are pinned, what is missing is said."""

import ast
import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "finealign_kernels"

# room -> rooms that it may import; a module always may import its own room
ARROW = {
    "formulas": set(),
    "kernels": {"formulas"},
    "ops": {"formulas", "kernels"},
    "losses": {"formulas", "kernels", "ops"},
    "rl": {"formulas", "kernels", "ops", "feedback"},
    "metarm": {"formulas", "kernels", "ops", "losses"},
    "integrations": {"formulas", "kernels", "ops", "losses", "rl", "feedback", "metarm"},
    "feedback": set(),
    "report": set(),
    "testing": {"formulas", "kernels"},
}
TOP = {"cli", "demo", "doctor", "strength", "__main__", "__init__"}  # these may import everything


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield ("finealign_kernels", *path.relative_to(PACKAGE).with_suffix("").parts), path
    for path in sorted((ROOT / "kernels/triton").rglob("*.py")):
        yield ("finealign_kernels", "kernels", path.stem), path


def imported(name, path):
    """Absolute names of what a module imports, at its top or in a function."""
    package = list(name[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield stem
            yield from (f"{stem}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            given = (arg.value for arg in node.args if isinstance(arg, ast.Constant))
            yield from (importlib.util.resolve_name(module, ".".join(package)) for module in given)


def violations(pairs):
    for name, path in pairs:
        room = name[1]
        for target in imported(name, path):
            parts = target.split(".")
            if parts[0] != "finealign_kernels" or len(parts) < 2 or room in TOP:
                continue
            if parts[1] in ARROW.keys() | TOP and parts[1] != room and parts[1] not in ARROW[room]:
                yield f"{'.'.join(name)} imports {target}"


def test_imports_point_one_way():
    found = list(modules())
    assert {name[1] for name, _ in found} - TOP <= ARROW.keys(), "a room without a place in the arrow"
    assert sorted(set(violations(found))) == []


@pytest.mark.parametrize(
    "source", ["from ..ops import logprobs", "from .. import losses", "import finealign_kernels.ops.logprobs"]
)
def test_the_arrow_sees_a_wrong_import(source, tmp_path):
    path = tmp_path / "margin.py"
    path.write_text(source)
    assert list(violations([(("finealign_kernels", "formulas", "margin"), path)]))


def test_every_name_that_is_imported_from_the_package_exists():
    """Also of modules that need a framework which is not installed here: they are read, not run."""
    missing = []
    for path in sorted(PACKAGE.rglob("*.py")):
        package = ["finealign_kernels", *path.relative_to(PACKAGE).parts[:-1]]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package[: len(package) - node.level + 1]
                parts = [*base, *(node.module.split(".") if node.module else [])]
                folder = ROOT.joinpath(*parts)
                source = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
                if parts[1:2] == ["kernels"] or not source.exists():  # device code, which is mapped into the package
                    continue
                text = source.read_text()
                missing += [
                    f"{path.relative_to(ROOT)}: {alias.name} of {source.relative_to(ROOT)}"
                    for alias in node.names
                    if not re.search(rf"\b{alias.name}\b", text)
                    and not (folder / alias.name).is_dir()
                    and not (folder / f"{alias.name}.py").exists()
                ]
    assert not missing, missing


def test_every_adapter_is_documented_and_has_a_planted_bug():
    """An adapter is a module of integrations with VERSIONS: the versions of the trainer that it was written for."""
    guides = "".join(path.read_text() for path in (ROOT / "docs/guides").glob("*.md"))
    api, mutants = (ROOT / "docs/api.md").read_text(), (ROOT / "tests/mutants.py").read_text()
    adapters = [path.stem for path in (PACKAGE / "integrations").glob("*.py") if "\nVERSIONS = " in path.read_text()]
    assert "skyrl" in adapters
    for name in sorted(adapters):
        assert f"::: finealign_kernels.integrations.{name}." in api, f"integrations.{name} is not in docs/api.md"
        assert re.search(rf"integrations\.{name}\b", guides), f"{name} has no guide"
        assert f'"integrations/{name}.py"' in mutants, f"{name} has no planted bug in tests/mutants.py"


def test_rivals_and_unsafe_loading_stay_out():
    for _, path in modules():
        source = path.read_text()
        assert not re.search(r"^\s*(import|from)\s+(liger_kernel|cut_cross_entropy|pickle|dill)\b", source, re.M), path
        assert "torch.load(" not in source and "eval(" not in source.replace(".eval(", ""), path
        if "integrations" not in path.parts:
            assert not re.search(r"^\s*(import|from)\s+trl\b", source, re.M), path


def run(code, **env):
    import os

    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, **env}, cwd="/"
    )


AUDIT = """
import sys, torch
seen = []
def hook(event, args):
    if event in ("subprocess.Popen", "os.system", "socket.connect", "os.mkdir", "os.remove", "os.rename"):
        seen.append((event, str(args)[:200]))
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        seen.append((event, str(args)[:200]))
sys.dont_write_bytecode = True
sys.addaudithook(hook)
import finealign_kernels
print(seen)
"""


def test_import_compiles_writes_and_fetches_nothing():
    found = run(AUDIT)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "[]"
    planted = run(AUDIT.replace("import finealign_kernels", "open('/dev/null', 'w')"))
    assert "open" in planted.stdout  # the hook sees a write


WITHOUT = """
import sys
sys.modules["triton"] = None  # importing it fails
import torch, finealign_kernels as fk
from finealign_kernels.ops import _choose, _native
h, w = torch.randn(5, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
out = fk.linear_logprobs(h, w, torch.arange(5), outputs=("entropy",))
loss = fk.simpo(out.logp[:4].view(2, 2)).loss
loss.backward()
assert h.grad.isfinite().all() and w.grad.any()
assert fk.segment_sum(torch.ones(4), torch.tensor([0, 1, 4])).tolist() == [1, 3]
print(_choose.choose("auto", h), "|", _native.reason)
"""


def test_a_pure_python_install_works_and_says_what_is_missing():
    found = run(WITHOUT, FINEALIGN_DISABLE_NATIVE="1", FINEALIGN_REQUIRE_NATIVE="")
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ["torch", "|", "FINEALIGN_DISABLE_NATIVE", "is", "set"]


COPIED = """
import importlib.util, sys
sys.modules["finealign_kernels"] = None  # importing it fails
sys.path.insert(0, sys.argv[1])
import torch, another_name as fk
from another_name.ops import _choose, _native
for backend in ("auto", "torch"):
    h, w = torch.randn(5, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    out = fk.linear_logprobs(h, w, torch.arange(5), outputs=("entropy",), backend=backend)
    torch.testing.assert_close(out.logp, (h @ w.T).log_softmax(1)[range(5), range(5)])
    fk.simpo(out.logp[:4].view(2, 2)).loss.backward()
    assert h.grad.isfinite().all() and w.grad.any()
modules = [_choose.rows(name) for name in ("torch", "native")]
modules += [_choose.layer(name) for name in ("torch", _choose.FUSED)]
if importlib.util.find_spec("triton"):
    modules += [_choose.fused(), _choose.rows("triton")]
assert all(module.__name__.startswith("another_name.") for module in modules), modules
print(_native.reason)
"""


def test_a_copy_under_another_name_works_by_itself(tmp_path):
    copy = tmp_path / "another_name"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "kernels/triton", copy / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    found = subprocess.run(
        [sys.executable, "-c", COPIED, tmp_path],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert found.returncode == 0, found.stderr
    if any(PACKAGE.glob("_C*.so")):
        assert found.stdout.strip() == "None"  # its own extension is used


def test_the_formulas_import_without_triton_and_without_the_extension():
    code = "import sys; sys.modules['triton'] = None\nimport finealign_kernels.formulas.logprobs"
    assert run(code, FINEALIGN_DISABLE_NATIVE="1", FINEALIGN_REQUIRE_NATIVE="").returncode == 0


def test_requiring_the_extension_fails_where_there_is_none():
    found = run("import finealign_kernels", FINEALIGN_DISABLE_NATIVE="1", FINEALIGN_REQUIRE_NATIVE="1")
    assert found.returncode != 0 and "FINEALIGN_REQUIRE_NATIVE is set, but" in found.stderr


CI_EXTRAS = ("model", "demo", "trl", "test", "docs", "lint")


def test_ci_versions_are_pinned_in_one_file():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert lines and all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.+-]+", line) for line in lines)
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    wanted = project["project"]["dependencies"] + project["build-system"]["requires"]
    wanted += [item for extra in CI_EXTRAS for item in extras[extra]]
    names = {re.match(r"[A-Za-z0-9_.-]+", item)[0].lower().replace("_", "-") for item in wanted}
    assert names - {"finealign-kernels"} <= pinned, names - pinned


def test_every_planted_bug_still_has_its_place():
    import runpy

    planted = runpy.run_path(str(ROOT / "tests/mutants.py"))
    for mutant in planted["MUTANTS"]:
        native = mutant.path.startswith(planted["NATIVE"])
        path = ROOT / mutant.path if native else PACKAGE / mutant.path
        path = ROOT / "kernels/triton" / path.name if mutant.path.startswith("kernels/") and not native else path
        assert path.read_text().count(mutant.old) == 1, f"{mutant.what}: {mutant.old!r} in {mutant.path}"


def test_every_package_is_in_the_wheel():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in PACKAGE.rglob("__init__.py")}
    assert listed == folders | {"finealign_kernels.kernels"}


def test_the_version_is_one():
    import finealign_kernels

    version = re.search(r'^VERSION = "(.+)"', (ROOT / "setup.py").read_text(), re.M)[1]
    assert finealign_kernels.__version__ == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


SHORT_FORMS = {
    "preference_loss": ("PreferenceOptions", ["dpo", "ipo", "simpo", "slic", "cdpo", "robust", "cpo", "orpo"]),
    "pointwise_loss": ("PointwiseOptions", ["kto", "pdpo", "ulma", "unlikelihood"]),
}


@pytest.mark.parametrize("long", SHORT_FORMS)
def test_short_forms_show_the_arguments_of_their_long_form(long):
    """For help() and inspect by their signature, for type checkers by the typed dictionary."""
    import finealign_kernels as fk
    from finealign_kernels.losses import options

    dictionary, names = SHORT_FORMS[long]
    passed = {p.name: p for p in inspect.signature(getattr(fk, long)).parameters.values() if p.kind is p.KEYWORD_ONLY}
    annotations = getattr(options, dictionary).__annotations__
    assert {*annotations, "target"} == {*passed, "target"}
    assert all(annotations[name] == passed[name].annotation for name in annotations)
    for name in names:
        function = getattr(fk, name)
        shown = inspect.signature(function).parameters
        assert function.__annotations__["options"] == f"Unpack[{dictionary}]"
        assert not any(p.kind is p.VAR_KEYWORD for p in shown.values()), name
        assert all(
            shown[key].default == passed[key].default for key in shown.keys() & passed.keys() - {"alpha", "target"}
        )
        assert len(passed.keys() - shown.keys()) <= 3, name  # those that it sets itself


SUBPACKAGES = """
import sys, finealign_kernels as fk
heavy = ("transformers", "trl", "accelerate")
assert not [name for name in heavy if name in sys.modules]
assert {"feedback", "integrations"} <= set(dir(fk))
assert fk.feedback.sample.__name__ == "sample"
assert fk.integrations.trl.__name__ == "finealign_kernels.integrations.trl"
for module in (fk, fk.integrations):
    try:
        module.nothing
    except AttributeError as error:
        assert "'nothing'" in str(error)
    else:
        raise AssertionError(module)
assert not [name for name in heavy if name in sys.modules]
"""


def test_subpackages_are_found_without_a_second_import_and_frameworks_stay_out():
    found = run(SUBPACKAGES)
    assert found.returncode == 0, found.stderr
