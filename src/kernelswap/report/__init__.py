"""Everything that is known about one model: `facts` as plain JSON, `page` as one HTML file, `text` for a terminal."""

from __future__ import annotations
