"""`pip install .` alone gives everything that a user of one machine needs."""

import os
import subprocess
import sys

from engine import ROOT


def test_pip_install_gives_package_and_programs(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment["CMAKE_BUILD_PARALLEL_LEVEL"] = str(os.cpu_count() or 1)
    environment.update(CMAKE_CXX_COMPILER_LAUNCHER="ccache", CMAKE_CUDA_COMPILER_LAUNCHER="ccache")
    environment.update(CCACHE_BASEDIR=str(ROOT), CCACHE_NOHASHDIR="1")

    def run(*command) -> str:
        result = subprocess.run(
            [str(word) for word in command], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, f"{command}: {result.stdout[-4000:]}{result.stderr[-4000:]}"
        return result.stdout

    run(sys.executable, "-m", "venv", "fresh")
    python = tmp_path / "fresh" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", ROOT)
    version = run(python, "-c", "import kvern, kvern._kvern; print(kvern._kvern.__version__)").strip()
    for program in ("kvernd", "kvernctl"):
        assert version in run(tmp_path / "fresh" / "bin" / program, "--version")
