"""Each refusal of check_installation, against packages and metadata on disk, met by a bare interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.runtime.install_check import (
    MEGATRON_CORE_RANGE,
    TORCH_RANGE,
    TRANSFORMER_ENGINE,
    TRANSFORMER_ENGINE_OF_0_16,
    InstallationError,
    check_installation,
)

ROOT = Path(__file__).parents[2]

EXPLODES = "raise RuntimeError('the check must not import this')\n"


def text_of(version: tuple) -> str:
    return ".".join(map(str, version[:3])) + version[3]


class Site:
    """A folder of packages: all that the probing interpreter (-S) sees beside this repository."""

    def __init__(self, folder: Path):
        self.folder = folder

    def module(self, path: str, text: str) -> None:
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_text(text)

    def distribution(self, name: str, version: str, purelib: bool = True) -> None:
        info = f"{name.replace('-', '_')}-{version}.dist-info"
        self.module(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        self.module(
            f"{info}/WHEEL",
            f"Wheel-Version: 1.0\nRoot-Is-Purelib: {str(purelib).lower()}\nTag: py3-none-any\n",
        )

    def torch(self, cuda: str | None, version: str = "2.13.0") -> None:
        self.distribution("torch", version, purelib=False)
        self.module("torch/version.py", f"cuda = {cuda!r}\n")
        self.module("torch/__init__.py", f"from torch import version\n__version__ = {version!r}\n")

    def megatron_core(self, version: tuple = (0, 16, 1, "")) -> None:
        self.distribution("megatron-core", text_of(version))
        self.megatron_source(version)

    def megatron_source(self, version: tuple) -> None:
        self.module("megatron/core/__init__.py", EXPLODES)
        constants = f"VERSION = {version!r}\n__version__ = {text_of(version)!r}\n"
        self.module("megatron/core/package_info.py", constants)

    def transformer_engine(self, *companions: str, purelib: bool = True, version: str = "2.11.0") -> None:
        self.module("transformer_engine/__init__.py", EXPLODES)
        self.distribution("transformer-engine", version, purelib)
        for name in companions:
            self.distribution(name, version, purelib=False)

    def nvidia_apex(self) -> None:
        self.module("apex/__init__.py", EXPLODES)
        self.module("apex/normalization/fused_layer_norm.py", EXPLODES)

    def probe(self, gpu_present: bool | None = False, **environment: str) -> tuple[str, str]:
        """-> (class name of what check_installation raised, or "ok"; its message). None: it finds out itself."""
        arguments = {} if gpu_present is None else {"gpu_present": gpu_present}
        result = subprocess.run(
            [sys.executable, "-S", ROOT / "tests/programs/probe_installation.py", json.dumps(arguments)],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(self.folder), str(ROOT)])} | environment,
            capture_output=True,
            text=True,
            check=True,
        )
        outcome, message, loaded = json.loads(result.stdout)
        assert loaded == [], "the check imported what it has to judge"
        return outcome, message

    def assert_refused(self, *words: str, gpu_present: bool = False) -> None:
        outcome, message = self.probe(gpu_present)
        assert outcome == "InstallationError", message
        assert len(message.splitlines()) == 1
        for word in words:
            assert word in message


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.mark.parametrize("cuda", [None, "13.0"])
def test_accepts_torch_and_megatron_core(site: Site, cuda):
    site.torch(cuda)
    site.megatron_core()
    assert site.probe() == ("ok", "")


def test_accepts_a_gpu_machine_with_everything(site: Site):
    site.torch("13.0")
    site.megatron_core()
    site.transformer_engine("transformer-engine-cu13", "transformer-engine-torch")
    site.nvidia_apex()
    assert site.probe(gpu_present=True) == ("ok", "")


def test_accepts_transformer_engine_built_from_source(site: Site):
    """Containers ship it so, with the compiled libraries inside and no companion distributions."""
    site.torch("13.0")
    site.megatron_core()
    site.transformer_engine(purelib=False)
    assert site.probe(gpu_present=True) == ("ok", "")


def test_accepts_this_environment():
    check_installation(gpu_present=False)


def test_error_is_a_value_error():
    assert issubclass(InstallationError, ValueError)


def test_refuses_missing_torch(site: Site):
    site.megatron_core()
    site.assert_refused("PyTorch is not installed", "pip install 'torch>=2.9'")


@pytest.mark.parametrize("version", ["2.8.0+cpu", "1.13.1", "2.6.0a0+ecf3bae40a.nv25.1"])
def test_refuses_torch_whose_attention_mixes_up_heads(site: Site, version):
    site.torch(None, version)
    site.megatron_core()
    site.assert_refused(f"torch {version} is not >=2.9", "wrong heads", "pip install 'torch>=2.9'")


@pytest.mark.parametrize("version", ["2.9.0", "2.11.0+cu130", "2.10.0a0+b4e4ee81d3.nv25.12", "3.0.0"])
def test_accepts_newer_torch(site: Site, version):
    site.torch("13.0", version)
    site.megatron_core()
    assert site.probe(gpu_present=True) == ("ok", "")


@pytest.mark.parametrize(
    "failure", ["OSError('libcudart.so.13:\\n cannot open')", "ImportError('libcudart.so.13: gone')"]
)
def test_refuses_torch_that_does_not_import(site: Site, failure):
    site.torch("13.0")
    site.module("torch/__init__.py", f"raise {failure}\n")
    site.assert_refused("does not import", "libcudart.so.13", "reinstall torch")


def test_refuses_torch_without_cuda_on_a_gpu_machine(site: Site):
    site.torch(None)
    site.megatron_core()
    words = "NVIDIA GPU", "torch 2.13.0", "without CUDA", "install a CUDA build", "CUDA_VISIBLE_DEVICES=''"
    site.assert_refused(*words, gpu_present=True)


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hiding_the_gpus_allows_torch_without_cuda(site: Site, hidden):
    site.torch(None)
    site.megatron_core()
    assert site.probe(None, CUDA_VISIBLE_DEVICES=hidden) == ("ok", "")


def test_refuses_transformer_engine_where_torch_has_no_cuda(site: Site):
    site.torch(None)
    site.megatron_core()
    site.transformer_engine("transformer-engine-cu12", "transformer-engine-torch")
    uninstall = "pip uninstall transformer-engine transformer-engine-cu12 transformer-engine-torch"
    site.assert_refused("no CUDA", "import megatron.core", uninstall)


@pytest.mark.parametrize(
    ("companions", "named", "not_named"),
    [
        ((), ["compiled core", "torch bindings"], []),
        (("transformer-engine-torch",), ["compiled core"], ["torch bindings"]),
        (("transformer-engine-cu12",), ["torch bindings"], ["compiled core"]),
        (("transformer-engine-cu13",), ["torch bindings"], ["compiled core"]),
    ],
)
def test_refuses_transformer_engine_without_its_compiled_parts(site: Site, companions, named, not_named):
    site.torch("13.0")
    site.megatron_core()
    site.transformer_engine(*companions)
    site.assert_refused(
        "transformer-engine is installed without",
        f"pip install --no-build-isolation '{TRANSFORMER_ENGINE_OF_0_16}'",
        *named,
    )
    _, message = site.probe()
    assert not any(word in message for word in not_named)


# megatron-core, Transformer Engine, what is wanted instead, whether a newer megatron-core would take it.
PAIRS = [
    ((0, 16, 1, ""), "2.12.0", TRANSFORMER_ENGINE_OF_0_16, True),
    ((0, 16, 1, ""), "2.20.2+4c8ab91", TRANSFORMER_ENGINE_OF_0_16, True),
    ((0, 16, 1, ""), "2.8.0", TRANSFORMER_ENGINE_OF_0_16, False),
    ((0, 16, 1, ""), "2.21.0", TRANSFORMER_ENGINE_OF_0_16, False),
    ((0, 17, 0, "rc0"), "2.8.0", TRANSFORMER_ENGINE, False),
    ((0, 19, 2, ""), "2.21.0", TRANSFORMER_ENGINE, False),
]


@pytest.mark.parametrize(("core", "version", "wanted", "newer"), PAIRS)
def test_refuses_a_transformer_engine_that_does_not_go_with_megatron_core(site: Site, core, version, wanted, newer):
    site.torch("13.0")
    site.megatron_core(core)
    site.transformer_engine(purelib=False, version=version)
    said = f"transformer-engine {version} does not go with megatron-core {text_of(core)}: "
    said += f"pip install --no-build-isolation '{wanted}'"
    said += ", or take megatron-core 0.17 or newer, which needs Python 3.12" if newer else ""
    assert site.probe(gpu_present=True) == ("InstallationError", said)


@pytest.mark.parametrize(
    ("core", "version"),
    [
        ((0, 16, 1, ""), "2.9.0"),
        ((0, 16, 1, ""), "2.11.0+c188b53"),
        ((0, 17, 1, ""), "2.12.0"),
        ((0, 19, 2, ""), "2.20.2"),
    ],
)
def test_accepts_a_transformer_engine_that_does(site: Site, core, version):
    site.torch("13.0")
    site.megatron_core(core)
    site.transformer_engine(purelib=False, version=version)
    assert site.probe(gpu_present=True) == ("ok", "")


def test_passes_over_a_mere_folder_called_transformer_engine(site: Site):
    site.torch(None)
    site.megatron_core()
    (site.folder / "transformer_engine").mkdir()
    assert site.probe() == ("ok", "")


@pytest.mark.parametrize("files", [["apex/__init__.py", "apex/views.py"], ["apex.py"], ["apex/setup.py"]])
def test_refuses_an_apex_that_is_not_nvidias(site: Site, files):
    """PyPI's web toolkit, a module of that name, and NVIDIA's when cloned but not installed."""
    site.torch("13.0")
    site.megatron_core()
    for path in files:
        site.module(path, EXPLODES)
    site.assert_refused("not NVIDIA's", str(site.folder / "apex"), "pip uninstall apex", gpu_present=True)


def test_refuses_nvidias_apex_where_torch_has_no_cuda(site: Site):
    site.torch(None)
    site.megatron_core()
    site.nvidia_apex()
    site.assert_refused("NVIDIA's apex", "no CUDA", "pip uninstall apex")


def test_refuses_missing_megatron_core(site: Site):
    site.torch(None)
    (site.folder / "megatron" / "bridge").mkdir(parents=True)
    site.assert_refused("megatron-core is not installed", f"pip install 'megatron-core{MEGATRON_CORE_RANGE}'")


@pytest.mark.parametrize(
    "version", [(0, 16, 0, ""), (0, 16, 1, "rc0"), (0, 20, 0, ""), (0, 20, 0, "rc0"), (1, 0, 0, "")]
)
def test_refuses_megatron_core_outside_the_range(site: Site, version):
    site.torch(None)
    site.megatron_core(version)
    site.assert_refused(
        f"megatron-core {text_of(version)} ", f"outside {MEGATRON_CORE_RANGE}", "pip install 'megatron-core"
    )


@pytest.mark.parametrize(
    "version", [(0, 16, 1, ""), (0, 16, 2, "rc1"), (0, 16, 11, ""), (0, 17, 0, "rc0"), (0, 19, 2, "")]
)
def test_accepts_megatron_core_inside_the_range(site: Site, version):
    site.torch(None)
    site.megatron_core(version)
    assert site.probe() == ("ok", "")


def test_judges_the_megatron_that_would_be_imported(site: Site):
    """A Megatron-LM checkout on the Python path hides the installed version, whatever pip's metadata says."""
    site.torch(None)
    site.distribution("megatron-core", "0.16.1")
    site.megatron_source((0, 15, 0, ""))
    site.assert_refused("megatron-core 0.15.0", str(site.folder / "megatron" / "core"))


def test_accepts_a_checkout_without_metadata(site: Site):
    site.torch(None)
    site.megatron_source((0, 16, 1, ""))
    assert site.probe() == ("ok", "")


def test_ranges_are_those_of_setup_py():
    text = (ROOT / "setup.py").read_text()
    assert f'"megatron-core{MEGATRON_CORE_RANGE}"' in text
    assert f'"torch{TORCH_RANGE}"' in text
    assert f"""'{TRANSFORMER_ENGINE}; python_version >= "3.12"'""" in text
    assert f"""'{TRANSFORMER_ENGINE_OF_0_16}; python_version < "3.12"'""" in text
