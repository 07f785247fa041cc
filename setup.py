"""setup.cfg says it all but one thing: a wheel carries `configs/`."""

import pathlib
import shutil

import setuptools
from setuptools.command.build_py import build_py

ROOT = pathlib.Path(__file__).parent


class BuildPy(build_py):
  """With the experiments where `utilized_rank.command.configs` looks."""

  def run(self):
    super().run()
    if self.editable_mode:
      return  # they are read where they are
    to = pathlib.Path(self.build_lib, 'utilized_rank/command/shipped/configs')
    to.mkdir(parents=True, exist_ok=True)
    for path in (ROOT / 'configs').glob('*.py'):
      shutil.copy(path, to)
    # With it they go before whatever else is called `configs`.
    (to / '__init__.py').touch()


setuptools.setup(cmdclass={'build_py': BuildPy})
