"""One case of first_launch: reads it from standard input, prints what broke the rule."""

import json
import sys
from typing import Any

from benchmarks.first_launch import violations
from sigjax.numerics import Case


def main() -> None:
    """The process that may hang."""
    implementation: Any = sys.argv[1]
    fields = json.load(sys.stdin)
    fields["lengths"] = fields["lengths"] and tuple(map(tuple, fields["lengths"]))
    print(json.dumps(violations(Case(**fields), implementation)))


if __name__ == "__main__":
    main()
