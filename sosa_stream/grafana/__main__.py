"""``python -m sosa_stream.grafana [FOLDER]`` writes dashboards and provisioning, by default into ``grafana/``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sosa_stream.grafana import provisioning
from sosa_stream.grafana.dashboards import documents


def files() -> dict[str, str]:
    """The text of every generated file, by its path in the folder."""
    texts = {
        f"dashboards/{name}.json": json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        for name, document in documents().items()
    }
    return texts | {
        "provisioning/dashboards/sosa.yaml": provisioning.DASHBOARDS,
        "provisioning/datasources/sosa.yaml": provisioning.DATASOURCES,
    }


def main(folder: Path) -> None:
    for name, text in files().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "grafana"))
