"""What an installation may lack, and which extra of this package has it."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
  """Says in one line which extra brings what is imported inside.

  Args:
    name: of `[options.extras_require]` in setup.cfg.

  Raises:
    ModuleNotFoundError: a module that is imported inside is not installed.

  >>> with extra('models'):
  ...   import no_such_module
  Traceback (most recent call last):
  ...
  ModuleNotFoundError: no_such_module is not installed: pip install
  'utilized-rank[models]' brings it
  """
  try:
    yield
  except ModuleNotFoundError as error:
    module = (error.name or str(error)).partition('.')[0]
    raise ModuleNotFoundError(
      f"{module} is not installed: pip install 'utilized-rank[{name}]' "
      'brings it',
      name=error.name,
    ) from error
