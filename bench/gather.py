"""One file of rows out of the JSON files that the steps of gpu_session.sh left. python bench/gather.py FOLDER FILE"""

import json
import sys
from pathlib import Path


def gathered(folder: Path) -> list[dict]:
    """Rows of every readable file, each with the name of its step; a file that was cut off is left out by name."""
    rows = []
    for file in sorted(folder.glob("*.json")):
        try:
            rows += [{"step": file.stem, **row} for row in json.loads(file.read_text())]
        except json.JSONDecodeError as error:
            print(f"{file} was cut off: {error}", file=sys.stderr)
    return rows


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(json.dumps(gathered(source), indent=1) + "\n")
