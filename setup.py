"""What pyproject.toml cannot say: a built package carries csrc/*.cu. Nothing is compiled, torch is not needed."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithSources(build_py):
    """In a checkout, and so in an editable install, csrc/ is found beside the package."""

    def run(self):
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib, "hrm_kernels", "csrc")
            self.mkpath(str(folder))
            for source in sorted(Path("csrc").glob("*.cu")):
                self.copy_file(str(source), str(folder / source.name))


setup(cmdclass={"build_py": BuildWithSources})
