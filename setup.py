"""The one build step that pyproject.toml cannot say: models.toml stands at the top and ships inside the package."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CATALOGUE = "models.toml"


class BuildWithCatalogue(build_py):
    """Copies models.toml beside edgellm/__init__.py. An editable install reads it from the top of the checkout."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.copy_file(CATALOGUE, str(Path(self.build_lib) / "edgellm" / CATALOGUE))

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), CATALOGUE]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), str(Path(self.build_lib) / "edgellm" / CATALOGUE)]


setup(cmdclass={"build_py": BuildWithCatalogue})
