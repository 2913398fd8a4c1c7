"""Writes the gallery into a built site: python docs/gallery.py site/gallery"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nsagen.reports.gallery import write_gallery  # noqa: E402
from nsagen.reports.target_support import read  # noqa: E402
from nsagen.spec import shipped_specs  # noqa: E402

if __name__ == "__main__":
    packages = [ROOT / "generated" / name for name in ("llama8b", "tiny")]
    table = read(ROOT / "docs" / "support.json")
    pages = list(write_gallery(Path(sys.argv[1]), shipped_specs(), packages, table))
    print(f"{len(pages)} pages of the gallery in {sys.argv[1]}")
