"""The house keeps its own order: complete rooms, imports downstairs, small files, no traps.

Every rule is a function from a tree to its faults. The tree at hand must have none, and a small
tree with one planted fault must show it, so that no rule is blind.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A file imports from its own floor or a lower one.
FLOORS = (
    *("kernels", "ranking", "dispatch", "tuning", "distributed", "ops", "modules", "models"),
    *("samplers", "data", "planning"),
    *("pipelines", "trainer", "integrations", "cli"),
)
ROOMS = (
    *("kernels/{}/__init__.py", "kernels/{}/reference.py", "hunyuan_fast/ops/{}.py"),
    *("tests/ops/test_{}.py", "benchmarks/bench_{}.py"),
)
IMPLEMENTATIONS = ("cuda_impl", "triton_impl", "cpu_impl", "library_impl", "reference")
NAMES = {"forward", "backward", "supports", "VERIFIED_ON"}
LIMITS = {".py": 500, ".cuh": 600, ".h": 400, ".cpp": 400, ".cu": 400}
# They do not import beside a CPU build of torch.
FORBIDDEN = {"torchvision", "torchaudio", "torchcodec", "timm", "lpips", "open_clip"}
UNSAFE_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
TORCH_HEADER = re.compile(r'#include\s*[<"](torch|ATen|c10)/')
# What a merge leaves where it could not decide.
UNMERGED = re.compile(r"^(<{7} |>{7} )", re.MULTILINE)
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")


def package_files(root: Path) -> list[Path]:
    return sorted([*root.glob("kernels/**/*.py"), *root.glob("hunyuan_fast/**/*.py")])


def all_python_files(root: Path) -> list[Path]:
    wings = ("kernels", "hunyuan_fast", "tests", "benchmarks", "examples", "scripts")
    return sorted(path for wing in wings for path in root.glob(f"{wing}/**/*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def at(path: Path, root: Path, node: ast.AST | None = None) -> str:
    line = f":{node.lineno}" if node is not None and hasattr(node, "lineno") else ""
    return f"{path.relative_to(root)}{line}"


def ops(root: Path) -> list[str]:
    return sorted({path.parent.name for path in root.glob("kernels/*/*.py")} - {"common"})


def module_name(path: Path, root: Path) -> str:
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[0] == "kernels":
        parts.insert(0, "hunyuan_fast")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, root: Path) -> Iterator[tuple[str, ast.AST]]:
    """Absolute names of all that a file imports, at any depth of nesting, with their nodes."""
    here = module_name(path, root).split(".")
    package = here if path.name == "__init__.py" else here[:-1]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            yield source, node
            yield from ((f"{source}.{alias.name}", node) for alias in node.names)


def floor(name: str) -> int | None:
    parts = name.split(".")
    if parts[0] == "hunyuan_fast" and len(parts) > 1 and parts[1] in FLOORS:
        return FLOORS.index(parts[1])
    return None


def rooms_are_complete(root: Path) -> list[str]:
    wanted = [room.format(op) for op in ops(root) for room in ROOMS]
    return [f"{name} is missing" for name in wanted if not (root / name).is_file()]


def rooms_open_with_prose(root: Path) -> list[str]:
    """The ``__init__.py`` of a room is a docstring and nothing else."""
    faults = []
    for path in root.glob("kernels/*/__init__.py"):
        tree = parse(path)
        if not ast.get_docstring(tree) or len(tree.body) != 1:
            faults.append(f"{at(path, root)} must be a docstring and nothing else")
    return faults


def top_level_names(tree: ast.Module) -> set[str]:
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def implementations_have_their_names(root: Path) -> list[str]:
    faults = []
    for path in root.glob("kernels/*/*.py"):
        if path.stem in IMPLEMENTATIONS:
            wanted = NAMES | ({"example"} if path.stem == "reference" else set())
            reference = path.with_name("reference.py")
            if reference.exists() and "INFERENCE_ONLY" in top_level_names(parse(reference)):
                wanted -= {"backward"}
            missing = wanted - top_level_names(parse(path))
            faults += [f"{at(path, root)} has no {name}" for name in sorted(missing)]
    return faults


def references_need_torch_alone(root: Path) -> list[str]:
    allowed = {"torch", "math", "__future__", "collections", "contextlib", "typing"}
    return [
        f"{at(path, root, node)} imports {name}"
        for path in root.glob("kernels/*/reference.py")
        for name, node in imports(path, root)
        if name.split(".")[0] not in allowed
    ]


def imports_point_downstairs(root: Path) -> list[str]:
    faults = []
    for path in package_files(root):
        here = floor(module_name(path, root))
        for name, node in imports(path, root):
            there = floor(name)
            if here is not None and there is not None and there > here:
                faults.append(f"{at(path, root, node)} imports {name} from a higher floor")
    return faults


def native_module_has_few_doors(root: Path) -> list[str]:
    """Only dispatch and the native implementations import ``hunyuan_fast._C``."""
    faults = []
    for path in package_files(root):
        if path.stem not in ("cuda_impl", "cpu_impl", "dispatch"):
            hits = [node for name, node in imports(path, root) if name == "hunyuan_fast._C"]
            faults += [f"{at(path, root, node)} imports hunyuan_fast._C" for node in hits]
    return faults


def kernels_is_no_package_of_its_own(root: Path) -> list[str]:
    shadow = (root / "kernels/__init__.py").exists()
    return ["kernels/__init__.py would shadow the kernels package of PyPI"] if shadow else []


def files_stay_small(root: Path) -> list[str]:
    files = [*all_python_files(root), *(path for path in root.glob("csrc/**/*") if path.is_file())]
    lines = {path: len(path.read_text().splitlines()) for path in files if path.suffix in LIMITS}
    return [
        f"{at(path, root)} has {count} lines, the limit is {LIMITS[path.suffix]}"
        for path, count in lines.items()
        if count > LIMITS[path.suffix]
    ]


def forbidden_modules_stay_out(root: Path) -> list[str]:
    return [
        f"{at(path, root, node)} imports {name}"
        for path in package_files(root)
        for name, node in imports(path, root)
        if name.split(".")[0] in FORBIDDEN
    ]


def nothing_is_unpickled(root: Path) -> list[str]:
    """Of pickle only its error, and ``torch.load`` only with a literal ``weights_only=True``."""
    faults = []
    for path in package_files(root):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ImportFrom) and node.module in UNSAFE_MODULES:
                faults.append(f"{at(path, root, node)} imports from {node.module}")
            used = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            if used.split(".")[0] in UNSAFE_MODULES and used != "pickle.UnpicklingError":
                faults.append(f"{at(path, root, node)} uses {used}")
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                if given.get("weights_only") != "True":
                    faults.append(f"{at(path, root, node)} calls torch.load without weights_only")
    return faults


def nothing_foreign_is_run(root: Path) -> list[str]:
    """No eval, no shell, no code from a model repository."""
    faults = []
    for path in package_files(root):
        for node in ast.walk(parse(path)):
            if not isinstance(node, ast.Call):
                continue
            if ast.unparse(node.func) in ("eval", "exec", "os.system", "os.popen"):
                faults.append(f"{at(path, root, node)} calls {ast.unparse(node.func)}")
            faults += [
                f"{at(path, root, node)} passes {word.arg}=True"
                for word in node.keywords
                if word.arg in ("shell", "trust_remote_code") and ast.unparse(word.value) == "True"
            ]
    return faults


def public_names_are_documented(root: Path) -> list[str]:
    faults = []
    for path in package_files(root):
        tree = parse(path)
        if tree.body and not ast.get_docstring(tree):
            faults.append(f"{at(path, root)} has no docstring")
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"
            if public and not ast.get_docstring(node):
                faults.append(f"{at(path, root, node)} {node.name} has no docstring")
    return faults


def nothing_is_left_unfinished(root: Path) -> list[str]:
    faults = []
    for path in package_files(root):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Raise) and "NotImplementedError" in ast.unparse(node):
                faults.append(f"{at(path, root, node)} raises NotImplementedError")
            if isinstance(node, ast.ExceptHandler) and ast.unparse(node.body) == "pass":
                caught = ast.unparse(node.type) if node.type else "BaseException"
                if caught in ("BaseException", "Exception"):
                    faults.append(f"{at(path, root, node)} swallows every exception")
    sources = [*package_files(root), *(path for path in root.glob("csrc/**/*") if path.is_file())]
    for path in sources:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if UNFINISHED.search(line):
                faults.append(f"{at(path, root)}:{number} {line.strip()}")
    return faults


def native_code_knows_no_torch(root: Path) -> list[str]:
    files = [path for path in root.glob("csrc/**/*") if path.is_file()]
    guilty = [path for path in files if TORCH_HEADER.search(path.read_text())]
    return [f"{at(path, root)} includes torch" for path in guilty]


def nothing_is_left_unmerged(root: Path) -> list[str]:
    sources = [path for path in root.glob("csrc/**/*") if path.is_file()]
    pages = [*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("Makefile")]
    files = [*all_python_files(root), *sources, *pages]
    guilty = [path for path in files if UNMERGED.search(path.read_text())]
    return [f"{at(path, root)} holds marks of an unfinished merge" for path in guilty]


RULES: tuple[Callable[[Path], list[str]], ...] = (
    *(rooms_are_complete, rooms_open_with_prose, implementations_have_their_names),
    *(references_need_torch_alone, imports_point_downstairs, native_module_has_few_doors),
    *(kernels_is_no_package_of_its_own, files_stay_small, forbidden_modules_stay_out),
    *(nothing_is_unpickled, nothing_foreign_is_run, public_names_are_documented),
    *(nothing_is_left_unfinished, nothing_is_left_unmerged, native_code_knows_no_torch),
)

REFERENCE = '''"""Plain."""
import torch
VERIFIED_ON = frozenset({"*"})
def example(device): "."
def supports(x): "."
def forward(x): "."
def backward(x): "."
'''
SOUND_TREE = {
    "kernels/common/__init__.py": '"""Shared."""',
    "kernels/scale/__init__.py": '"""y = 2 x."""',
    "kernels/scale/reference.py": REFERENCE,
    "hunyuan_fast/__init__.py": '"""The package."""',
    "hunyuan_fast/ops/__init__.py": "",
    "hunyuan_fast/ops/scale.py": '"""Op."""\nfrom hunyuan_fast.kernels.scale import reference\n',
    "hunyuan_fast/models/__init__.py": '"""Models."""\nfrom hunyuan_fast.ops import scale\n',
    "tests/ops/test_scale.py": "",
    "benchmarks/bench_scale.py": "",
    "csrc/scale/api.cpp": "#include <vector>\n",
}
# Each rule with faults to plant: (file, its whole content, or None to remove it).
PLANTED = [
    (rooms_are_complete, "benchmarks/bench_scale.py", None),
    (rooms_are_complete, "tests/ops/test_scale.py", None),
    (rooms_are_complete, "kernels/empty/__init__.py", '"""A room with nothing in it."""'),
    (rooms_open_with_prose, "kernels/scale/__init__.py", '"""Prose."""\nimport torch\n'),
    (implementations_have_their_names, "kernels/scale/cpu_impl.py", '"""."""\nVERIFIED_ON = 1\n'),
    (implementations_have_their_names, "kernels/scale/reference.py", '"""."""\nimport torch\n'),
    (references_need_torch_alone, "kernels/scale/reference.py", REFERENCE + "import numpy\n"),
    (imports_point_downstairs, "hunyuan_fast/ops/scale.py", '"""."""\nimport hunyuan_fast.cli\n'),
    (imports_point_downstairs, "hunyuan_fast/ops/scale.py", '"""."""\nfrom .. import models\n'),
    (
        imports_point_downstairs,
        "hunyuan_fast/models/dit.py",
        '"""."""\ndef build():\n    "."\n    from hunyuan_fast.pipelines import text_to_video\n',
    ),
    (imports_point_downstairs, "kernels/scale/cpu_impl.py", "from hunyuan_fast import dispatch\n"),
    (native_module_has_few_doors, "hunyuan_fast/ops/scale.py", "from hunyuan_fast import _C\n"),
    (kernels_is_no_package_of_its_own, "kernels/__init__.py", ""),
    (files_stay_small, "hunyuan_fast/models/long.py", '"""."""\n' + "x = 1\n" * 500),
    (files_stay_small, "csrc/scale/long.cpp", "\n" * 401),
    (forbidden_modules_stay_out, "hunyuan_fast/models/a.py", "import torchvision.ops\n"),
    (nothing_is_unpickled, "hunyuan_fast/models/a.py", "x = pickle.load(f)\n"),
    (nothing_is_unpickled, "hunyuan_fast/models/a.py", "from pickle import Unpickler\n"),
    (nothing_is_unpickled, "hunyuan_fast/models/a.py", "torch.load(p, weights_only=False)\n"),
    (nothing_is_unpickled, "hunyuan_fast/models/a.py", "torch.load(p)\n"),
    (nothing_foreign_is_run, "hunyuan_fast/models/a.py", "f(trust_remote_code=True)\n"),
    (nothing_foreign_is_run, "hunyuan_fast/models/a.py", "run('x', shell=True)\n"),
    (nothing_foreign_is_run, "hunyuan_fast/models/a.py", "eval('x')\n"),
    (public_names_are_documented, "hunyuan_fast/models/a.py", '"""."""\ndef f(): return 1\n'),
    (public_names_are_documented, "hunyuan_fast/models/a.py", "x = 1\n"),
    (nothing_is_left_unfinished, "hunyuan_fast/models/a.py", "raise NotImplementedError('x')\n"),
    (nothing_is_left_unfinished, "hunyuan_fast/models/a.py", "# TODO later\n"),
    (nothing_is_left_unfinished, "csrc/scale/api.cpp", "// FIXME\n"),
    (nothing_is_left_unfinished, "hunyuan_fast/models/a.py", "try: f()\nexcept: pass\n"),
    (nothing_is_left_unfinished, "hunyuan_fast/a.py", "try: f()\nexcept Exception: pass\n"),
    (nothing_is_left_unmerged, "docs/page.md", "<<<<<<< one\nx\n=======\ny\n>>>>>>> other\n"),
    (nothing_is_left_unmerged, "csrc/scale/api.cpp", "x;\n>>>>>>> other\n"),
    (native_code_knows_no_torch, "csrc/scale/api.cpp", "#include <torch/extension.h>\n"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_the_rule(rule):
    assert rule(ROOT) == []


def build_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_sound_tree_has_no_faults(rule, tmp_path):
    assert rule(build_tree(tmp_path, SOUND_TREE)) == []


@pytest.mark.parametrize(("rule", "name", "text"), PLANTED)
def test_a_planted_fault_is_found(rule, name, text, tmp_path):
    build_tree(tmp_path, SOUND_TREE)
    if text is None:
        (tmp_path / name).unlink()
    else:
        build_tree(tmp_path, {name: text})
    assert rule(tmp_path)


def test_every_rule_has_a_planted_fault():
    assert {rule for rule, _, _ in PLANTED} == set(RULES)


def test_floors_are_the_ones_on_disk():
    wing = ROOT / "hunyuan_fast"
    on_disk = {path.stem for path in wing.iterdir() if path.is_dir() or path.suffix == ".py"}
    on_disk -= {"__init__", "__main__", "__pycache__", "assets"}
    assert on_disk <= set(FLOORS), f"not on any floor: {sorted(on_disk - set(FLOORS))}"


def test_the_implementations_are_those_of_dispatch():
    dispatch = pytest.importorskip("hunyuan_fast.dispatch")
    assert dispatch.IMPLEMENTATIONS == IMPLEMENTATIONS
    assert sys.modules["hunyuan_fast.dispatch"] is dispatch
