"""Build villa; a wheel also holds the folders ``projects`` and ``tools`` of the checkout, below ``villa``."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithProjects(build_py):
    """Copies the recipes and tools into what is built, so that they are found without a checkout."""

    def run(self) -> None:
        """Build the package, then add them; an editable install uses those of the checkout."""
        super().run()
        if not self.editable_mode:
            unwanted = shutil.ignore_patterns("__pycache__", "outputs", "benchmarks", "docs_site")
            for folder in ("projects", "tools"):
                target = Path(self.build_lib, "villa", folder)
                shutil.copytree(folder, target, ignore=unwanted, dirs_exist_ok=True)


setup(cmdclass={"build_py": WithProjects})
