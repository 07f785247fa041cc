"""A hook of the site: links to files outside docs/ are their text alone."""

import re
from typing import Any

_OUTSIDE = re.compile(r'(?<!!)\[((?:`[^`]*`|[^\]`])*)\]\(\.\./[^)]*\)')


def on_page_markdown(markdown: str, **_: Any) -> str:
  """The page as the site has it; on a code host the links lead somewhere."""
  return _OUTSIDE.sub(r'\1', markdown)
