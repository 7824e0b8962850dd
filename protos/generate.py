"""Makes agent/pb, the Python code of the wire, from the .proto files beside this script.

protoc writes imports as if its modules were top-level; they are rewritten to live in agent.pb,
so that nothing has to be put on sys.path in the guest.
"""

from __future__ import annotations

import re
import shutil
import sys
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

HERE = Path(__file__).resolve().parent
OUTPUT = HERE.parent / "agent" / "pb"


def main() -> int:
    """Writes agent/pb anew; returns protoc's exit code."""
    sources = sorted(HERE.glob("*.proto"))
    ours = "|".join(f"{source.stem}_pb2" for source in sources)
    top_level_import = re.compile(rf"^import ({ours})\b", re.MULTILINE)
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    (OUTPUT / "__init__.py").write_text('"""Generated from protos/ by protos/generate.py."""\n')
    code = protoc.main(
        [
            "protoc",
            f"--proto_path={HERE}",
            f"--proto_path={resources.files('grpc_tools') / '_proto'}",
            f"--python_out={OUTPUT}",
            f"--grpc_python_out={OUTPUT}",
            f"--mypy_out=quiet:{OUTPUT}",
            f"--mypy_grpc_out=quiet:{OUTPUT}",
            *map(str, sources),
        ]
    )
    for path in OUTPUT.glob("*_pb2*.py*"):
        path.write_text(top_level_import.sub(r"from agent.pb import \1", path.read_text()))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
