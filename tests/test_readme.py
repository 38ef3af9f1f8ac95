"""The README's first example runs as it stands, and links of the documents lead somewhere."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf8")


def test_the_first_example_runs():
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert example is not None
    names: dict[str, object] = {}
    exec(example[1], names)  # the example asserts that padding gets no gradient
    assert "gradient" in names


def test_pictures_and_named_files_exist():
    paths = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README) + re.findall(
        r"`((?:\w[\w-]*/)+[\w.-]+\.\w+)`", README
    )
    assert len(paths) > 3
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing


def test_the_feature_table_leads_to_files_that_exist():
    table = (ROOT / "sigjax" / "FEATURES.md").read_text(encoding="utf8")
    paths = re.findall(r"\]\(([^)]+)\)", table)
    assert len(paths) > 15
    missing = [path for path in paths if not (ROOT / "sigjax" / path).exists()]
    assert not missing
